"""Publishes a comparison: results.jsonl, the long table on the terminal, as CSV and JSON, the report, and a W&B run."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mobiq_lightning.comparison.file_names import TABLE, TABLE_CSV
from mobiq_lightning.comparison.folder import ComparisonFolder
from mobiq_lightning.comparison.grid import Cell, Grid
from mobiq_lightning.comparison.report import (
    ReportCell,
    ReportInput,
    Value,
    columns_of,
    lines_of,
    not_finite,
    write_report,
)
from mobiq_lightning.comparison.table import INTERPOLATION, CellRow, TableRow, long_table, points_of
from mobiq_lightning.comparison.tracking import log_comparison
from mobiq_lightning.comparison.verdicts import all_in_verdicts, verdicts
from mobiq_lightning.console import say, table_console
from mobiq_lightning.files import write_json, write_text
from mobiq_lightning.runs import Row

COLUMNS = (
    "strategy", "allocation", "used_bits", "perplexity_mean", "perplexity_spread", "kl_mean", "kl_spread", "n"
)  # fmt: skip


def publish(
    grid: Grid, folder: ComparisonFolder, cells: Sequence[Cell], failures: Mapping[str, str], command: str
) -> None:
    """Writes tables and report of the finished cells of a comparison, prints the table, and logs to W&B if asked for.

    A cell whose files are damaged is named as such, and one whose perplexity is not finite is in the table, but in no chart;
    neither costs the others anything.

    Args:
        grid: The grid.
        folder: Folder of the comparison.
        cells: All cells of the grid.
        failures: Reasons by slug of the failed cell.
        command: Command line that makes the comparison, for the report.
    """
    rows, damaged, whole = folder.write_rows(cells, failures), folder.damaged(cells), folder.whole(cells)
    if not rows:
        return
    points = points_of(rows, grid.bits)
    table = long_table(points)
    finished = [s for s in grid.strategies if any(row.strategy == s for row in rows)]
    sentences = verdicts(points, finished, grid.bits, len(grid.seeds)) + all_in_verdicts(rows, finished, grid.bits)
    sentences += _not_deployable(folder, whole) + noticed_by_guards(folder, whole) + _not_finite(rows)
    sentences += [f"{cell.name} is damaged: {damaged[cell.slug]}" for cell in cells if cell.slug in damaged]
    sentences += [f"{cell.name} failed: {failures[cell.slug]}" for cell in cells if cell.slug in failures]
    first = folder.measured(whole[0])
    found = ReportInput(
        title=grid.title or grid.name,
        command=command,
        verdicts=sentences,
        model=first.model,
        protocol=first.protocol,
        environment=first.environment,
        cells=[_describe(folder, cell, failures, damaged) for cell in cells],
        table=table,
        interpolation=INTERPOLATION,
    )
    write_json(folder.path / TABLE, _as_json(grid, found))
    write_text(folder.path / TABLE_CSV, _as_csv(table))
    report = write_report(folder.path, found)
    print_comparison(found, grid.seeds)
    say(f"The report is {report}.")
    if grid.wandb is not None:
        log_comparison(grid, found, folder.charts())


def print_comparison(report: ReportInput, seeds: Sequence[int]) -> None:
    """Prints a table of perplexities by strategy and used bits, and the verdicts of the comparison in sentences."""
    from rich.table import Table

    protocol = report.protocol
    bits = columns_of(report.table)
    table = Table(
        title=f"{report.title}: perplexity at equal used bits\n{report.model} on {protocol.data}, "
        f"{protocol.eval_protocol}, window {protocol.window}, {protocol.n_tokens} tokens, seeds {seeds}"
    )
    for column in ("strategy", "allocation", *(f"{asked:g} bits" for asked in bits)):
        table.add_column(column, justify="left" if column in ("strategy", "allocation") else "right", no_wrap=True)
    for group in lines_of(report.table, "perplexity"):
        table.add_section()
        for line in group:
            table.add_row(line.strategy, line.allocation, *map(_as_text, line.values))
    console = table_console()
    console.print(table)
    for sentence in report.verdicts:
        console.print(f"- {sentence}", markup=False, highlight=False)


def _as_text(value: Value | None) -> str:
    return "" if value is None else f"{value.text} {value.spread}".rstrip()


def _as_json(grid: Grid, report: ReportInput) -> dict[str, Any]:
    """The content of table.json."""
    return {
        "name": grid.name,
        "title": report.title,
        "command": report.command,
        "model": report.model,
        "protocol": report.protocol.to_json(),
        "environment": report.environment,
        "seeds": grid.seeds,
        "interpolation": report.interpolation,
        "verdicts": report.verdicts,
        "cells": [cell.to_json() for cell in report.cells],
        "table": [row.to_json() for row in report.table],
    }


def _not_deployable(folder: ComparisonFolder, cells: Sequence[Cell]) -> list[str]:
    """A sentence for each strategy whose routers only say how good others could be."""
    stored: dict[str, float] = {}
    for cell in cells:
        measured = folder.measured(cell)
        if measured.slices is not None and not measured.deployable:
            stored[cell.strategy] = measured.slices.router_bits
    return [
        f"{strategy} cannot be deployed: its routers store {bits:.1f} bits per weight. It knows the error of each "
        "layer exactly, and bounds what a router can know of that; perplexity can be better."
        for strategy, bits in stored.items()
    ]


def noticed_by_guards(folder: ComparisonFolder, cells: Sequence[Cell]) -> list[str]:
    """A sentence for each finished cell in which guards of the calibration noticed something."""
    said = []
    for cell in folder.whole(cells):
        counts = Counter(f"{event.guard} ({event.action})" for event in folder.measured(cell).guards)
        if counts:
            what = ", ".join(f"{count} x {name}" for name, count in counts.items())
            said.append(f"{cell.name}: guards noticed {what}; its run folder's results.json says where.")
    return said


def _not_finite(rows: Sequence[CellRow]) -> list[str]:
    """A sentence for each cell with figures that are not finite."""
    lost: dict[tuple[str, int], list[Row]] = {}
    for one in rows:
        if not one.row.finite:
            lost.setdefault((one.strategy, one.cell_seed), []).append(one.row)
    return [f"{strategy}, seed {seed}: {not_finite(found)}." for (strategy, seed), found in lost.items()]


def _describe(
    folder: ComparisonFolder, cell: Cell, failures: Mapping[str, str], damaged: Mapping[str, str]
) -> ReportCell:
    if cell.slug in damaged:
        return ReportCell(cell.strategy, cell.seed, cell.folder, cell.changes, "damaged", reason=damaged[cell.slug])
    if folder.finished(cell):
        return ReportCell(cell.strategy, cell.seed, cell.folder, cell.changes, "finished", **vars(folder.figures(cell)))
    reason = failures.get(cell.slug, "was not run")
    return ReportCell(cell.strategy, cell.seed, cell.folder, cell.changes, "failed", reason=reason)


def _as_csv(table: Sequence[TableRow]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(row.to_json() for row in table)
    return text.getvalue()
