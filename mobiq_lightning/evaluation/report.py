"""The table of a comparison: on the terminal, as JSON, as CSV and as a plot."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobiq_lightning.files import write_atomically, write_json, write_text
from mobiq_lightning.runs import COLUMNS, bits_text, heading, label, sentences, summarize, verdict

if TYPE_CHECKING:
    pass

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
