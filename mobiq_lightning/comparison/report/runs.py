"""Reads the run folders of a comparison, and notes what is missing in them."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobiq_lightning.comparison.report.input import ReportCell
from mobiq_lightning.errors import FileError, ResultsError
from mobiq_lightning.input_files import parse_json, read_text
from mobiq_lightning.runs import (
    DIAGNOSTICS,
    JOURNAL,
    MOST_BITS,
    RESULTS,
    SHORT,
    Allocation,
    Control,
    Diagnostics,
    Metric,
    Record,
    Results,
    Row,
    at_least,
    read_diagnostics,
    read_json,
    spread_of,
)

_PARTS = {
    RESULTS: "the Pareto curves",
    DIAGNOSTICS: "bits per input, depths, block errors, positions and frequencies",
    JOURNAL: "loss and budget over progress",
}


@dataclass(frozen=True)
class Run:
    """The files of a finished run as they were read; None or empty where a file is missing.

    Args:
        seed: Seed of the run.
        rows: Rows of the comparison from results.json.
        diagnostics: Content of diagnostics.json.
        epochs: Means over epochs from metrics.jsonl, in order: the step, and metrics logged as ``block/``, without
            that.
        steps: Single steps from metrics.jsonl, in order, with the same keys.
    """

    seed: int
    rows: Sequence[Row] = ()
    diagnostics: Diagnostics | None = None
    epochs: Sequence[Mapping[str, float]] = ()
    steps: Sequence[Mapping[str, float]] = ()

    @property
    def drawn(self) -> list[Row]:
        """The rows that charts show: those whose figures are finite."""
        return [row for row in self.rows if row.finite]


@dataclass(frozen=True)
class Strategy:
    """A strategy and its finished runs.

    Args:
        name: Name of the strategy.
        number: Place of the strategy in the grid, which decides colour and marker.
        runs: Finished runs, one per seed.
    """

    name: str
    number: int
    runs: Sequence[Run] = field(default_factory=list)

    @property
    def diagnosed(self) -> list[Diagnostics]:
        """The diagnostics of those runs that have them."""
        return [run.diagnostics for run in self.runs if run.diagnostics is not None]


def read_strategies(cells: Sequence[ReportCell]) -> tuple[list[Strategy], list[str]]:
    """Reads the files of every finished run.

    Returns:
        Strategies in the order of the cells, also those without a finished run; and a sentence for everything that is
        missing, cannot be read, or cannot be drawn.
    """
    missing: list[str] = []
    runs: dict[str, list[Run]] = {}
    for cell in cells:
        done = runs.setdefault(cell.strategy, [])
        if cell.status == "finished":
            done.append(_read_run(cell, done, missing))
    return [Strategy(name, number, done) for number, (name, done) in enumerate(runs.items())], missing


def _read_run(cell: ReportCell, others: Sequence[Run], missing: list[str]) -> Run:
    """Reads a run whose strategy has the given other ones."""
    who = f"{cell.strategy}, seed {cell.seed}"

    def read(name: str, parse: Callable[[Path], Any]) -> Any:
        try:
            return parse(cell.folder / name)
        except (ResultsError, FileError) as error:
            said = str(error).removeprefix(f"{cell.folder}{os.sep}").rstrip(".")
            missing.append(f"{who}: {_PARTS[name]} are without this run: {said}.")
        return None

    results = read(RESULTS, lambda path: Results.from_json(read_json(path), path))
    rows = results.measured.rows if results is not None and results.measured is not None else ()
    epochs, steps = read(JOURNAL, read_journal) or ([], [])
    diagnostics = read(DIAGNOSTICS, read_diagnostics)
    known = next((run.diagnostics for run in others if run.diagnostics is not None), None)
    if diagnostics is not None and known is not None and _tables(diagnostics) != _tables(known):
        missing.append(
            f"{who}: {_PARTS[DIAGNOSTICS]} are without this run: {DIAGNOSTICS} has other inputs, depths, budgets or blocks than "
            "the first run of the strategy."
        )
        diagnostics = None
    if lost := [row for row in rows if not row.finite]:
        missing.append(f"{who}: {not_finite(lost)}; charts leave it out.")
    return Run(cell.seed, rows, diagnostics, epochs, steps)


def not_finite(rows: Sequence[Row]) -> str:
    """Which rows have no finite perplexity and KL divergence, as a clause."""
    places = [f"{SHORT[row.allocation]} at {row.target_bits:g} bits" for row in rows]
    shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
    return f"perplexity or KL is not finite ({shown})"


def _tables(found: Diagnostics) -> tuple[Any, ...]:
    """What must be the same in runs whose tables are averaged."""
    budgets = [budget.target_bits for budget in found.budgets]
    return found.shape, found.depths, budgets, [entry.name for entry in found.inputs]


@dataclass(frozen=True)
class _Entry(Record):
    """What a line of metrics.jsonl has where a loss was logged.

    Args:
        step: The step.
        loss: The loss; not finite where a calibration has failed.
        target_bits: Bits per weight that were asked for.
        index: Index of the block, from 0.
        routed_bits: Bits that the gates spent, where the objective measures it.
    """

    step: int = field(metadata=at_least(0))
    loss: float
    target_bits: float = field(metadata=at_least(0, MOST_BITS))
    index: float = field(metadata=at_least(0, 10**6))
    routed_bits: float | None = field(default=None, metadata=at_least(0, MOST_BITS))


def read_journal(path: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Epochs and steps of a journal. A resumed run writes some steps again; the later line counts.

    Raises:
        FileError: If the journal is missing, or a line is not JSON.
        ResultsError: If a line does not hold what a loss is logged with.
    """
    found: dict[str, dict[int, dict[str, float]]] = {"_epoch": {}, "_step": {}}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where = f"{path}, line {number}"
        entry = parse_json(line, where)
        if not isinstance(entry, dict):
            raise ResultsError(f"{where} holds no mapping")
        for kind, by_step in found.items():
            if f"block/loss{kind}" in entry:
                logged = {k.removeprefix("block/").removesuffix(kind): v for k, v in entry.items() if "block/" in k}
                checked = _Entry.from_json({**logged, "step": entry.get("step")}, where)
                loss = checked.loss if math.isfinite(checked.loss) else math.nan  # which a chart leaves out
                by_step[checked.step] = {**checked.to_json(), "loss": loss}
    epochs, steps = (sorted(by_step.values(), key=lambda e: e["step"]) for by_step in found.values())
    return epochs, steps


@dataclass(frozen=True)
class CurvePoint:
    """A point of a curve in a chart.

    Args:
        x: Place on the horizontal axis, such as used bits.
        mean: Mean over runs.
        spread: Standard deviation over runs; 0 for one run.
    """

    x: float
    mean: float
    spread: float


def curve(runs: Sequence[Run], allocation: Allocation, metric: Metric) -> list[CurvePoint]:
    """A strategy's curve of a metric over used bits with one allocation: mean over runs, and draws of controls."""
    by_budget: dict[float, list[Row]] = {}
    for row in (row for run in runs for row in run.drawn if row.allocation == allocation):
        by_budget.setdefault(row.target_bits, []).append(row)
    points = [_point([r.used_bits for r in group], [r.figure(metric) for r in group]) for group in by_budget.values()]
    return sorted(points, key=lambda point: point.x)


def against(runs: Sequence[Run], control: Control, metric: Metric) -> list[CurvePoint]:
    """A strategy's curve over used bits of the percent by which its router is above a control of the same run."""
    by_budget: dict[float, list[tuple[float, float]]] = {}
    for run in runs:
        for row in (r for r in run.drawn if r.allocation == "router"):
            others = [
                other.figure(metric)
                for other in run.drawn
                if other.allocation == control and other.target_bits == row.target_bits
            ]
            if others and statistics.fmean(others) > 0:
                difference = 100 * (row.figure(metric) / statistics.fmean(others) - 1)
                by_budget.setdefault(row.target_bits, []).append((row.used_bits, difference))
    points = [_point(*zip(*group, strict=True)) for group in by_budget.values()]
    return sorted(points, key=lambda point: point.x)


def _point(bits: Sequence[float], values: Sequence[float]) -> CurvePoint:
    return CurvePoint(statistics.fmean(bits), statistics.fmean(values), spread_of(values))


def mean_of(tables: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The mean over runs of tables of equal shape, entry by entry."""
    return [[statistics.fmean(values) for values in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]
