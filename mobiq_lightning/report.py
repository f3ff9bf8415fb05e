"""The table of a comparison: on the terminal, as JSON, as CSV and as a plot."""

from __future__ import annotations

import csv
import io
import shutil
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mobiq_lightning.files import write_atomically, write_json, write_text
from mobiq_lightning.guard_events import sentences

if TYPE_CHECKING:
    from mobiq_lightning.checkpoint.summary import Summary

COLUMNS = ("allocation", "target_bits", "used_bits", "all_in_bits", "perplexity", "kl", "seed")
TIE = 0.001
"""Relative difference in perplexity below which two allocations count as equal."""
LABELS = {
    "full": "full precision",
    "rtn": "round to nearest",
    "router": "router",
    "static": "static layers",
    "layers": "best layers",
    "shuffled": "shuffled tokens",
    "random": "random tokens",
}
Control = Literal["static", "layers", "shuffled", "random"]
CONTROLS: tuple[Control, ...] = get_args(Control)
"""What a router has to beat at the bits that it used, as far as it was measured; see `controls`."""
SHORT = {**LABELS, "static": "static", "shuffled": "shuffled", "random": "random"}
"""What sentences call an allocation."""
_COLORS = {"rtn": "#8c8c8c", "router": "#c8102e", "static": "#1f77b4", "layers": "#7b3fa0"}
_COLORS |= {"shuffled": "#c99700", "random": "#2ca02c"}
_MARKERS = {"rtn": "s", "router": "o", "static": "^", "layers": "D", "shuffled": "+", "random": "x"}


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Writes results.json, results.csv and results.png into a run folder, each atomically."""
    write_json(folder / "results.json", results)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(results["rows"])
    write_text(folder / "results.csv", text.getvalue())
    write_atomically(folder / "results.png", lambda path: plot(results, path))


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with those that differ only in the seed of random tokens as one: mean, and `spread` as +-."""
    merged: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        merged.setdefault((row["allocation"], row["target_bits"]), []).append(row)
    summary = []
    for group in merged.values():
        mean = {key: statistics.fmean(row[key] for row in group) for key in COLUMNS[2:6]}
        spread = statistics.stdev(row["perplexity"] for row in group) if len(group) > 1 else 0.0
        summary.append({**group[0], **mean, "spread": spread, "n_seeds": len(group)})
    order = list(LABELS)
    return sorted(
        summary, key=lambda row: (row["allocation"] != "full", row["target_bits"], order.index(row["allocation"]))
    )


def label(allocation: str, results: dict[str, Any]) -> str:
    """What tables call an allocation: a router that cannot be deployed is called so.

    Args:
        allocation: Of a row.
        results: results.json.
    """
    deployable = allocation != "router" or results.get("router", {}).get("deployable", True)
    return LABELS[allocation] if deployable else f"{LABELS[allocation]}, not deployable"


def generated_of(calibration: dict[str, Any]) -> str:
    """What the model wrote itself of the calibration text, as a clause; checkpoints from before that say nothing of it."""
    n_generated = calibration.get("n_generated", 0)
    return f" and {n_generated} windows that the model wrote" if n_generated else ""


def heading(results: dict[str, Any]) -> str:
    """Model, text and protocol; of local files their name, as a path tells nobody anything."""
    protocol = results["protocol"]
    model, data = (
        Path(name).name if Path(name).is_absolute() else name for name in (results["model"], protocol["data"])
    )
    return f"{model} on {data}, {protocol['eval_protocol']}, window {protocol['window']}"


def print_table(results: dict[str, Any]) -> None:
    """Prints the comparison and, in words, how the router did against the controls and what guards noticed."""
    from rich.console import Console
    from rich.table import Table

    protocol = results["protocol"]
    table = Table(
        title=f"{heading(results)}, {protocol['n_tokens']} tokens",
        caption=verdict(results["rows"]),
    )
    for column in ("allocation", "target bits", "used bits", "all-in bits", "perplexity", "KL (nats)"):
        table.add_column(column, justify="left" if column == "allocation" else "right", no_wrap=True)
    last = None
    for row in summarize(results["rows"]):
        if last is not None and row["target_bits"] != last:
            table.add_section()
        last = row["target_bits"]
        spread = f" ± {row['spread']:.2f}" if row["n_seeds"] > 1 else ""
        cells = [f"{row[key]:.2f}" for key in ("used_bits", "all_in_bits")]
        table.add_row(
            label(row["allocation"], results),
            f"{row['target_bits']:g}",
            *cells,
            f"{row['perplexity']:.2f}{spread}",
            f"{row['kl']:.4f}",
        )
    width = None if sys.stdout.isatty() else max(100, shutil.get_terminal_size().columns)
    console = Console(width=width)
    console.print(table)
    for line in sentences(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Says in words at which budgets the router has a lower perplexity than the best control that was measured, and where not."""
    by_budget: dict[float, dict[str, float]] = {}
    for row in summarize(rows):
        if row["allocation"] in ("router", *CONTROLS):
            by_budget.setdefault(row["target_bits"], {})[row["allocation"]] = row["perplexity"]
    controls = [name for name in CONTROLS if any(name in found for found in by_budget.values())]
    wins: list[str] = []
    losses: list[str] = []
    ties: list[str] = []
    for bits, perplexity in by_budget.items():
        nothing_left = len({round(value, 6) for value in perplexity.values()}) == 1  # at the ends of the range
        if nothing_left or len(perplexity) < 1 + len(controls):
            continue
        best = min(controls, key=lambda name: perplexity[name])
        lead = perplexity["router"] / perplexity[best] - 1
        group = ties if abs(lead) < TIE else wins if lead < 0 else losses
        group.append(f"{bits:g} ({lead:+.1%} against {SHORT[best]})")
    beaten = {1: "the one control", 2: "both controls"}.get(len(controls), "all controls")
    parts = [f"The router beats {beaten} at {_join(wins)}." if wins else f"The router beats {beaten} nowhere."]
    parts += [f"It is behind at {_join(losses)}."] if losses else []
    parts += [f"Within {TIE:.1%} at {_join([t.split()[0] for t in ties])}."] if ties else []
    return " ".join(parts) if wins or losses or ties else ""


def _join(items: list[str]) -> str:
    return ", ".join(items)


def plot(results: dict[str, Any], path: Path) -> None:
    """Perplexity against used bits, one line per allocation, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = summarize(results["rows"])
    full = next(row for row in rows if row["allocation"] == "full")
    axes.axhline(full["perplexity"], color="black", linewidth=1, linestyle=":", label="full precision")
    for allocation, color in _COLORS.items():
        points = sorted(
            (row["used_bits"], row["perplexity"], row["spread"]) for row in rows if row["allocation"] == allocation
        )
        if not points:
            continue
        bits, perplexity, spread = zip(*points, strict=True)
        axes.errorbar(
            bits,
            perplexity,
            yerr=spread,
            color=color,
            marker=_MARKERS[allocation],
            markersize=5,
            linewidth=1.3 if allocation != "rtn" else 0,
            capsize=2,
            label=label(allocation, results),
        )
    axes.set_yscale("log")
    axes.set_xlabel("used code bits per weight")
    axes.set_ylabel("perplexity (log scale)")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}")
    axes.grid(True, which="both", alpha=0.25)
    axes.set_title(heading(results), fontsize=10)
    axes.legend()
    figure.savefig(path, format="png")


def print_summary(summary: Summary) -> None:
    """Prints what a checkpoint holds."""
    from rich.console import Console
    from rich.table import Table

    from mobiq_lightning.checkpoint.summary import SCALES, VALUE_TABLES
    from mobiq_lightning.packing import WHOLE_ROW

    console = Console(width=None if sys.stdout.isatty() else max(100, shutil.get_terminal_size().columns))
    elastic, origin = summary.config, summary.provenance
    held = elastic["slice_bits"]
    table = Table(title=str(summary.folder), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    shapes = ", ".join(f"{count} x ({shape[0]} x {shape[1]})" for shape, count in summary.linears.items())
    table.add_row("model", f"{summary.architecture}, {summary.n_blocks} blocks")
    table.add_row(
        "sliced linears", f"{sum(summary.linears.values())}, {summary.n_weights / 1e6:,.2f} M weights: {shapes}"
    )
    table.add_row("slices", f"{held} bits; {summary.n_planes} planes held, readable at {summary.depths} bits")
    columns = elastic["group_size"]
    table.add_row("groups", "whole rows" if columns >= WHOLE_ROW else f"{columns} columns")
    if code := elastic.get("code"):
        table.add_row("code", f"{code}; the reference reads it, the kernels do not")
    bound = "" if summary.deployable else ", not deployable: an upper bound for routers that see one input"
    table.add_row("routers", f"{summary.n_routers} x {elastic['router']['class_path'].rpartition('.')[2]}{bound}")
    transform = elastic.get("transform")
    if transform is not None:
        arguments = ", ".join(f"{name}={value}" for name, value in transform["init_args"].items())
        kept = " and ".join(transform["stored"]) or "nothing"
        name = transform["class_path"].rpartition(".")[2]
        table.add_row("transform", f"{name}({arguments}); kept per input: {kept}")
    table.add_row("dial", f"stands at {elastic['default_bits']:g} bits, thresholds per {elastic['threshold_scope']}")
    values = [kind for kind in (SCALES, VALUE_TABLES, "transforms") if summary.bytes_by_kind[kind]]
    stored = summary.bits_per_weight("planes", *values)
    routers = summary.bits_per_weight("routers", "threshold tables")
    table.add_row(
        "stored bits per weight", f"{stored:.3f} with {' and '.join(values)}, {stored + routers:.3f} with routers"
    )
    sizes = ", ".join(f"{kind} {size / 1e6:,.2f} MB" for kind, size in summary.bytes_by_kind.most_common())
    table.add_row("sizes", sizes)
    if origin:
        source, calibration, versions = origin["source"], origin["calibration"], origin["environment"]
        table.add_section()
        table.add_row("source model", f"{source['name']}, weights {source['weights']}, tokenizer {source['tokenizer']}")
        table.add_row(
            "calibration",
            f"{calibration['n_samples']} x {calibration['seq_len']} tokens of {calibration['data']}"
            f"{generated_of(calibration)}, data hash {calibration['data_hash']}, seed {origin['seed']}",
        )
        table.add_row(
            "code", f"mobiq-lightning {versions['mobiq_lightning']}, commit {origin['git_commit'] or 'unknown'}"
        )
        table.add_row("made", f"{versions['date']}, torch {versions['torch']}, transformers {versions['transformers']}")
    console.print(table)
    if summary.results.get("rows"):
        print_table(summary.results)
    if summary.results.get("latency"):
        from mobiq_lightning.latency.report import print_budgets

        print_budgets(summary.results["latency"])
    if summary.results.get("lm_eval"):
        print_harness(summary.results["lm_eval"])
    if not summary.results:
        console.print("No results are stored with it.")


def print_harness(entries: list[dict[str, Any]]) -> None:
    """Prints what tasks of lm-evaluation-harness gave."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="lm-evaluation-harness")
    for column in ("task", "metric", "bits", "used bits", "value", "examples"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", no_wrap=True)
    for entry in entries:
        used = "" if entry["used_bits"] is None else f"{entry['used_bits']:.2f}"
        error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.4f}"
        values = [entry["task"], entry["metric"], bits_text(entry), used, f"{entry['value']:.4f}{error}"]
        table.add_row(*values, str(entry["n_examples"]))
    Console(width=None if sys.stdout.isatty() else max(100, shutil.get_terminal_size().columns)).print(table)


def bits_text(entry: dict[str, Any]) -> str:
    """Of what the harness gave: the budget, or ``full``."""
    return entry["bits"] if isinstance(entry["bits"], str) else f"{entry['bits']:g}"
