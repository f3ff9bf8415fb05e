"""The table of a comparison: on the terminal, as JSON, as CSV and as a plot."""

from __future__ import annotations

import csv
import io
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from mobiq_lightning.files import write_atomically, write_json, write_text

COLUMNS = ("allocation", "target_bits", "used_bits", "all_in_bits", "perplexity", "kl", "seed")
_LABELS = {
    "full": "full precision",
    "rtn": "round to nearest",
    "router": "router",
    "static": "static layers",
    "random": "random tokens",
}
_COLORS = {"rtn": "#8c8c8c", "router": "#c8102e", "static": "#1f77b4", "random": "#2ca02c"}
_MARKERS = {"rtn": "s", "router": "o", "static": "^", "random": "x"}


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
    """Rows with those that differ only in the seed of the random allocation as one: mean, and `spread` as +-."""
    merged: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        merged.setdefault((row["allocation"], row["target_bits"]), []).append(row)
    summary = []
    for group in merged.values():
        mean = {key: statistics.fmean(row[key] for row in group) for key in COLUMNS[2:6]}
        spread = statistics.stdev(row["perplexity"] for row in group) if len(group) > 1 else 0.0
        summary.append({**group[0], **mean, "spread": spread, "n_seeds": len(group)})
    order = list(_LABELS)
    return sorted(
        summary, key=lambda row: (row["allocation"] != "full", row["target_bits"], order.index(row["allocation"]))
    )


def print_table(results: dict[str, Any]) -> None:
    """Prints the comparison and, in words, how the router did against the controls."""
    from rich.console import Console
    from rich.table import Table

    protocol = results["protocol"]
    table = Table(
        title=f"{results['model']} on {protocol['data']}, {protocol['eval_protocol']}, window {protocol['window']}, "
        f"{protocol['n_tokens']} tokens",
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
            _LABELS[row["allocation"]],
            f"{row['target_bits']:g}",
            *cells,
            f"{row['perplexity']:.2f}{spread}",
            f"{row['kl']:.4f}",
        )
    width = None if sys.stdout.isatty() else max(100, shutil.get_terminal_size().columns)
    Console(width=width).print(table)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Says at which budgets the router has the lowest perplexity of the three allocations, and where not."""
    by_budget: dict[float, dict[str, float]] = {}
    for row in summarize(rows):
        if row["allocation"] in ("router", "static", "random"):
            by_budget.setdefault(row["target_bits"], {})[row["allocation"]] = row["perplexity"]
    choices = {b: p for b, p in by_budget.items() if len(p) == 3 and len({round(v, 6) for v in p.values()}) > 1}
    wins = [b for b, p in choices.items() if p["router"] < min(p["static"], p["random"])]
    losses = [b for b in choices if b not in wins]
    parts = []
    if wins:
        parts.append(f"The router beats static and random at {_list(wins)} bits.")
    if losses:
        best = {b: min(("static", "random"), key=lambda name: choices[b][name]) for b in losses}
        detail = ", ".join(f"{b:g} ({best[b]} {choices[b][best[b]] / choices[b]['router'] - 1:+.1%})" for b in losses)
        parts.append(
            f"It does not beat the better of them at: {detail}." if wins else f"The router wins nowhere: {detail}."
        )
    return " ".join(parts)


def _list(bits: list[float]) -> str:
    return ", ".join(f"{b:g}" for b in bits)


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
            label=_LABELS[allocation],
        )
    axes.set_yscale("log")
    axes.set_xlabel("used code bits per weight")
    axes.set_ylabel("perplexity (log scale)")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}")
    axes.grid(True, which="both", alpha=0.25)
    protocol = results["protocol"]
    axes.set_title(
        f"{results['model']} on {protocol['data']} ({protocol['eval_protocol']}, window {protocol['window']})",
        fontsize=10,
    )
    axes.legend()
    figure.savefig(path, format="png")
