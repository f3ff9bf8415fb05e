"""What a comparison leaves: results.jsonl, the long table on the terminal, as CSV and JSON, the report, and a W&B run."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mobiq_lightning.comparison.folder import ComparisonFolder
from mobiq_lightning.comparison.grid import Cell, Grid
from mobiq_lightning.comparison.report import ReportCell, ReportInput, Value, columns_of, lines_of, write_report
from mobiq_lightning.comparison.table import INTERPOLATION, long_table, points_of
from mobiq_lightning.comparison.tracking import log_comparison
from mobiq_lightning.comparison.verdicts import storage_verdict, verdicts
from mobiq_lightning.console import say
from mobiq_lightning.files import write_json, write_text

COLUMNS = (
    "strategy", "allocation", "used_bits", "perplexity_mean", "perplexity_spread", "kl_mean", "kl_spread", "n"
)  # fmt: skip


def publish(
    grid: Grid, folder: ComparisonFolder, cells: Sequence[Cell], failures: Mapping[str, str], command: str
) -> None:
    """Writes and prints what the finished cells of a comparison give."""
    rows = folder.write_rows(cells, failures)
    if not rows:
        return
    points = points_of(rows, grid.bits)
    table = long_table(points)
    finished = [s for s in grid.strategies if any(row["strategy"] == s for row in rows)]
    sentences = verdicts(points, finished, grid.bits, len(grid.seeds)) + storage_verdict(rows, finished)
    sentences += _not_deployable(folder, cells) + noticed_by_guards(folder, cells)
    sentences += [f"{cell.name} failed: {failures[cell.slug]}" for cell in cells if cell.slug in failures]
    first = folder.results(next(cell for cell in cells if folder.finished(cell)))
    summary = {
        "name": grid.name,
        "title": grid.title or grid.name,
        "command": command,
        "model": first["model"],
        "protocol": first["protocol"],
        "environment": first["environment"],
        "seeds": grid.seeds,
        "interpolation": INTERPOLATION,
        "verdicts": sentences,
        "cells": [_describe(folder, cell, failures) for cell in cells],
        "table": table,
    }
    write_json(folder.path / "table.json", summary)
    write_text(folder.path / "table.csv", _as_csv(table))
    report = write_report(folder.path, _report_of(summary))
    print_comparison(summary)
    say(f"The report is {report}.")
    if grid.wandb is not None:
        log_comparison(grid, summary, sorted(folder.path.glob("*.png")))


def print_comparison(summary: Mapping[str, Any]) -> None:
    """Prints perplexities by strategy and used bits, and what the comparison says."""
    from rich.console import Console
    from rich.table import Table

    protocol = summary["protocol"]
    bits = columns_of(summary["table"])
    table = Table(
        title=f"{summary['title']}: perplexity at equal used bits\n{summary['model']} on {protocol['data']}, "
        f"{protocol['eval_protocol']}, window {protocol['window']}, {protocol['n_tokens']} tokens, seeds {summary['seeds']}"
    )
    for column in ("strategy", "allocation", *(f"{asked:g} bits" for asked in bits)):
        table.add_column(column, justify="left" if column in ("strategy", "allocation") else "right", no_wrap=True)
    for group in lines_of(summary["table"], "perplexity"):
        table.add_section()
        for line in group:
            table.add_row(line.strategy, line.allocation, *map(_as_text, line.values))
    console = Console(width=None if sys.stdout.isatty() else max(120, shutil.get_terminal_size().columns))
    console.print(table)
    for sentence in summary["verdicts"]:
        console.print(f"- {sentence}", markup=False, highlight=False)


def _as_text(value: Value | None) -> str:
    return "" if value is None else f"{value.text} {value.spread}".rstrip()


def _report_of(summary: Mapping[str, Any]) -> ReportInput:
    known = {field.name for field in fields(ReportCell)}
    described = [{**cell, "folder": Path(cell["folder"])} for cell in summary["cells"]]
    cells = [ReportCell(**{key: value for key, value in cell.items() if key in known}) for cell in described]
    shared = {field.name: summary[field.name] for field in fields(ReportInput) if field.name != "cells"}
    return ReportInput(**shared, cells=cells)


def _not_deployable(folder: ComparisonFolder, cells: Sequence[Cell]) -> list[str]:
    """A sentence for each strategy whose routers only say how good others could be."""
    stored: dict[str, float] = {}
    for cell in cells:
        results = folder.results(cell) if folder.finished(cell) else {}
        if not results.get("router", {}).get("deployable", True):
            stored[cell.strategy] = results["slices"]["router_bits"]
    return [
        f"{strategy} cannot be deployed: its routers store {bits:.1f} bits per weight. It knows the error of each "
        "layer exactly, and bounds what a router can know of that; perplexity can be better."
        for strategy, bits in stored.items()
    ]


def noticed_by_guards(folder: ComparisonFolder, cells: Sequence[Cell]) -> list[str]:
    """A sentence for each finished cell in which guards of the calibration noticed something."""
    said = []
    for cell in (cell for cell in cells if folder.finished(cell)):
        events = folder.results(cell).get("guards") or []
        counts = Counter(f"{event['guard']} ({event['action']})" for event in events)
        if counts:
            what = ", ".join(f"{count} x {name}" for name, count in counts.items())
            said.append(f"{cell.name}: guards noticed {what}; its run folder's results.json says where.")
    return said


def _describe(folder: ComparisonFolder, cell: Cell, failures: Mapping[str, str]) -> dict[str, Any]:
    done = folder.finished(cell)
    described = {"strategy": cell.strategy, "seed": cell.seed, "changes": cell.changes, "folder": str(cell.folder)}
    if done:
        return {**described, "status": "finished", **folder.figures(cell)}
    return {**described, "status": "failed", "reason": failures.get(cell.slug, "was not run")}


def _as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
