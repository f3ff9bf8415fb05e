"""Writes the table of a comparison: on the terminal, as JSON and as CSV, with its plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mobiq_lightning.console import table_console, tables_are_whole
from mobiq_lightning.evaluation.figure import plot
from mobiq_lightning.files import write_atomically, write_json, write_text
from mobiq_lightning.runs import (
    COLUMNS,
    CONTROLS,
    RESULTS,
    RESULTS_PLOT,
    RESULTS_TABLE,
    GainsSummary,
    HarnessEntry,
    MeanRow,
    Measured,
    Results,
    findings,
    label,
    sentences,
    summarize,
)

_ALIKE = 1e-6
"""Relative difference in perplexity below which controls read the same: at the ends of the range nothing is left to choose."""


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
    """Prints the table of a comparison and, in words, how the router did against controls and what guards noticed.

    At each budget of the router, rounding and the best control are shown; within `whole_tables` all rows are.
    """
    from rich.table import Table

    table = Table(
        title=f"{measured.heading}, {measured.protocol.n_tokens} tokens",
        caption="\n".join(findings(measured.rows)),
    )
    for column in ("allocation", "target bits", "used bits", "all-in bits", "perplexity", "KL (nats)"):
        table.add_column(column, justify="left" if column == "allocation" else "right", no_wrap=True)
    rows = summarize(measured.rows)
    names = {row: label(row.allocation, measured.deployable) for row in rows}
    shown = names if tables_are_whole() else _what_counts(names)
    last = None
    for row, name in shown.items():
        if last is not None and row.target_bits != last:
            table.add_section()
        last = row.target_bits
        spread = f" ± {row.spread:.2f}" if row.n_seeds > 1 else ""
        table.add_row(
            name,
            f"{row.target_bits:g}",
            f"{row.used_bits:.2f}",
            f"{row.all_in_bits:.2f}",
            f"{row.perplexity:.2f}{spread}",
            f"{row.kl:.4f}",
        )
    console = table_console()
    console.print(table)
    left = len(names) - len(shown)
    gains = measured.layer_gains
    said = [gains.sentence] if isinstance(gains, GainsSummary) and gains.sentence else []
    said += [f"{left} more rows are in {RESULTS_TABLE}; --all shows them here."] if left else []
    # Depths that are worse than rounding are named with the table's own figures, of the evaluation text.
    noticed = [event for event in measured.guards if event.guard != "worse_depth"]
    for line in [*said, *sentences(noticed)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _what_counts(names: Mapping[MeanRow, str]) -> dict[MeanRow, str]:
    """Full precision, the router, and at its budgets rounding and the best control; what tables call them."""
    found: dict[MeanRow, str] = {}
    budgets = {row.target_bits for row in names if row.allocation == "router"}
    at_budget: dict[float, list[MeanRow]] = {}
    for row in names:
        if row.allocation in CONTROLS:
            at_budget.setdefault(row.target_bits, []).append(row)
    for row, name in names.items():
        others = at_budget.get(row.target_bits, [])
        if row.allocation == "rtn" and budgets and row.target_bits not in budgets:
            continue
        if row not in others:
            found[row] = name
        elif row is others[0]:
            best = min(others, key=lambda other: other.perplexity if other.finite else math.inf)
            alike = len(others) > 1 and max(r.perplexity for r in others) - best.perplexity <= _ALIKE * best.perplexity
            found[best] = "all controls" if alike else f"best control: {names[best]}"
    return found


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
