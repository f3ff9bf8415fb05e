"""What a comparison leaves: results.jsonl, the long table on the terminal, as CSV and JSON, the report, and a W&B run."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mobiq_lightning.comparison.folder import ComparisonFolder
from mobiq_lightning.comparison.grid import Cell, Grid
from mobiq_lightning.comparison.table import INTERPOLATION, long_table, points_of
from mobiq_lightning.comparison.tracking import log_comparison
from mobiq_lightning.comparison.verdicts import verdicts
from mobiq_lightning.files import write_json, write_text
from mobiq_lightning.report import LABELS

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
    sentences = verdicts(points, finished, grid.bits, len(grid.seeds))
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
    print_comparison(summary)
    if grid.wandb is not None:
        log_comparison(grid, summary, sorted(folder.path.glob("*.png")))


def print_comparison(summary: Mapping[str, Any]) -> None:
    """Prints perplexities by strategy and used bits, and what the comparison says."""
    from rich.console import Console
    from rich.table import Table

    protocol = summary["protocol"]
    bits = sorted({row["used_bits"] for row in summary["table"] if row["allocation"] != "full"})
    table = Table(
        title=f"{summary['title']}: perplexity at equal used bits\n{summary['model']} on {protocol['data']}, "
        f"{protocol['eval_protocol']}, window {protocol['window']}, {protocol['n_tokens']} tokens, seeds {summary['seeds']}"
    )
    for column in ("strategy", "allocation", *(f"{asked:g} bits" for asked in bits)):
        table.add_column(column, justify="left" if column in ("strategy", "allocation") else "right", no_wrap=True)
    last = None
    for strategy, allocation, cells in _lines(summary["table"], bits):
        if last is not None and strategy != last:
            table.add_section()
        last = strategy
        table.add_row(strategy, LABELS[allocation], *cells)
    console = Console(width=None if sys.stdout.isatty() else max(120, shutil.get_terminal_size().columns))
    console.print(table)
    for sentence in summary["verdicts"]:
        console.print(f"- {sentence}", markup=False, highlight=False)


def _lines(table: Sequence[Mapping[str, Any]], bits: Sequence[float]) -> list[tuple[str, str, list[str]]]:
    """Strategy, allocation and perplexities at each of `bits`; full precision and rounding once if all share them."""
    lines: dict[tuple[str, str], dict[float, str]] = {}
    for row in table:
        at = bits[0] if row["allocation"] == "full" else row["used_bits"]
        lines.setdefault((row["strategy"], row["allocation"]), {})[at] = _with_spread(row, "perplexity", 2)
    shared: dict[tuple[str, ...], set[str]] = {}
    for (strategy, allocation), values in lines.items():
        shared.setdefault((allocation, *values.values()), set()).add(strategy)
    n_strategies = len({strategy for strategy, _ in lines})
    ordered: list[tuple[str, str, list[str]]] = []
    for (strategy, allocation), values in sorted(lines.items(), key=lambda item: item[0][1] not in ("full", "rtn")):
        name = strategy
        if allocation in ("full", "rtn"):
            owners = shared[(allocation, *values.values())]
            if strategy != min(owners):
                continue
            name = (
                "" if len(owners) == n_strategies else ", ".join(s for s, a in lines if a == allocation and s in owners)
            )
        ordered.append((name, allocation, [values.get(asked, "") for asked in bits]))
    return ordered


def _with_spread(row: Mapping[str, Any], name: str, digits: int) -> str:
    spread = row[f"{name}_spread"]
    return f"{row[f'{name}_mean']:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


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
