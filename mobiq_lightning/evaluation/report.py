"""Writes the table of a comparison: on the terminal, as JSON, as CSV and as a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobiq_lightning.console import table_console
from mobiq_lightning.files import write_atomically, write_json, write_text
from mobiq_lightning.runs import (
    COLUMNS,
    RESULTS,
    RESULTS_PLOT,
    RESULTS_TABLE,
    Allocation,
    HarnessEntry,
    Measured,
    Results,
    findings,
    label,
    sentences,
    summarize,
)

_COLORS: dict[Allocation, str] = {"rtn": "#8c8c8c", "router": "#c8102e", "static": "#1f77b4", "layers": "#7b3fa0"}
_COLORS |= {"shuffled": "#c99700", "random": "#2ca02c"}
_MARKERS = {"rtn": "s", "router": "o", "static": "^", "layers": "D", "shuffled": "+", "random": "x"}


def write_results(results: Results, folder: Path) -> None:
    """Writes results.json into a run folder and, if there are rows of a comparison, results.csv and results.png."""
    write_json(folder / RESULTS, results.to_json())
    if results.measured is None:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(row.to_json() for row in results.measured.rows)
    write_text(folder / RESULTS_TABLE, text.getvalue())
    figure = plot(results.measured)
    write_atomically(folder / RESULTS_PLOT, lambda path: figure.savefig(path, format="png"))


def print_table(measured: Measured) -> None:
    """Prints the table of a comparison and, in words, how the router did against controls and what guards noticed."""
    from rich.table import Table

    table = Table(
        title=f"{measured.heading}, {measured.protocol.n_tokens} tokens",
        caption="\n".join(findings(measured.rows)),
    )
    for column in ("allocation", "target bits", "used bits", "all-in bits", "perplexity", "KL (nats)"):
        table.add_column(column, justify="left" if column == "allocation" else "right", no_wrap=True)
    last = None
    for row in summarize(measured.rows):
        if last is not None and row.target_bits != last:
            table.add_section()
        last = row.target_bits
        spread = f" ± {row.spread:.2f}" if row.n_seeds > 1 else ""
        table.add_row(
            label(row.allocation, measured.deployable),
            f"{row.target_bits:g}",
            f"{row.used_bits:.2f}",
            f"{row.all_in_bits:.2f}",
            f"{row.perplexity:.2f}{spread}",
            f"{row.kl:.4f}",
        )
    console = table_console()
    console.print(table)
    for line in sentences(measured.guards):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def plot(measured: Measured) -> Any:
    """Draws perplexity against used bits, one line per allocation; a perplexity that is not finite is left out.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = summarize(row for row in measured.rows if row.finite)
    for full in (row for row in rows if row.allocation == "full"):
        axes.axhline(full.perplexity, color="black", linewidth=1, linestyle=":", label="full precision")
    for allocation, color in _COLORS.items():
        points = sorted((row.used_bits, row.perplexity, row.spread) for row in rows if row.allocation == allocation)
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
            label=label(allocation, measured.deployable),
        )
    axes.set_yscale("log")
    axes.set_xlabel("used code bits per weight")
    axes.set_ylabel("perplexity (log scale)")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}")
    axes.grid(True, which="both", alpha=0.25)
    lost = len(measured.rows) - sum(row.finite for row in measured.rows)
    said = f"\n{lost} of {len(measured.rows)} rows are not finite and left out" if lost else ""
    axes.set_title(f"{measured.heading}{said}", fontsize=10, parse_math=False)
    if rows:
        axes.legend()
    return figure


def print_harness(entries: Sequence[HarnessEntry]) -> None:
    """Prints a table of the scores of tasks of lm-evaluation-harness, a row for each task, metric and budget."""
    from rich.table import Table

    table = Table(title="lm-evaluation-harness")
    for column in ("task", "metric", "bits", "used bits", "value", "examples"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", no_wrap=True)
    for entry in entries:
        used = "" if entry.used_bits is None else f"{entry.used_bits:.2f}"
        error = "" if entry.stderr is None else f" ± {entry.stderr:.4f}"
        values = [entry.task, entry.metric_text, entry.bits_text, used, f"{entry.value:.4f}{error}"]
        table.add_row(*values, str(entry.n_examples))
    table_console().print(table)
