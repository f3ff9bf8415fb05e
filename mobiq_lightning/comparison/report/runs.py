"""Reads the run folders of a comparison, and notes what is missing in them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mobiq_lightning.comparison.report.input import ReportCell
from mobiq_lightning.errors import ResultsError
from mobiq_lightning.runs import (
    DIAGNOSTICS,
    JOURNAL,
    RESULTS,
    Allocation,
    Control,
    Diagnostics,
    Metric,
    Results,
    Row,
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
        missing or cannot be read.
    """
    missing: list[str] = []
    runs: dict[str, list[Run]] = {}
    for cell in cells:
        done = runs.setdefault(cell.strategy, [])
        if cell.status == "finished":
            done.append(_read_run(cell, missing))
    return [Strategy(name, number, done) for number, (name, done) in enumerate(runs.items())], missing


def _read_run(cell: ReportCell, missing: list[str]) -> Run:
    def read(name: str, parse: Callable[[str], Any]) -> Any:
        try:
            return parse((cell.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            problem = f"{name} is missing"
        except (ValueError, KeyError, OSError, ResultsError) as error:
            problem = f"{name} cannot be read ({type(error).__name__}: {error})"
        missing.append(f"{cell.strategy}, seed {cell.seed}: {problem}, so {_PARTS[name]} are without this run.")
        return None

    measured = read(RESULTS, lambda text: Results.from_json(json.loads(text), RESULTS).measured)
    epochs, steps = read(JOURNAL, _read_journal) or ([], [])
    diagnostics = read(DIAGNOSTICS, lambda text: Diagnostics.from_json(json.loads(text), DIAGNOSTICS))
    return Run(cell.seed, measured.rows if measured is not None else (), diagnostics, epochs, steps)


def _read_journal(text: str) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Epochs and steps of a journal. A resumed run writes some steps again; the later line counts."""
    found: dict[str, dict[int, dict[str, float]]] = {"_epoch": {}, "_step": {}}
    for line in text.splitlines():
        entry = json.loads(line)
        for kind, by_step in found.items():
            if f"block/loss{kind}" in entry:
                logged = {k.removeprefix("block/").removesuffix(kind): v for k, v in entry.items() if "block/" in k}
                by_step[entry["step"]] = {"step": entry["step"], **logged}
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
    for row in (row for run in runs for row in run.rows if row.allocation == allocation):
        by_budget.setdefault(row.target_bits, []).append(row)
    points = [_point([r.used_bits for r in group], [r.figure(metric) for r in group]) for group in by_budget.values()]
    return sorted(points, key=lambda point: point.x)


def against(runs: Sequence[Run], control: Control, metric: Metric) -> list[CurvePoint]:
    """A strategy's curve over used bits of the percent by which its router is above a control of the same run."""
    by_budget: dict[float, list[tuple[float, float]]] = {}
    for run in runs:
        for row in (r for r in run.rows if r.allocation == "router"):
            others = [
                other.figure(metric)
                for other in run.rows
                if other.allocation == control and other.target_bits == row.target_bits
            ]
            if others and statistics.fmean(others) > 0:
                difference = 100 * (row.figure(metric) / statistics.fmean(others) - 1)
                by_budget.setdefault(row.target_bits, []).append((row.used_bits, difference))
    points = [_point(*zip(*group, strict=True)) for group in by_budget.values()]
    return sorted(points, key=lambda point: point.x)


def _point(bits: Sequence[float], values: Sequence[float]) -> CurvePoint:
    return CurvePoint(statistics.fmean(bits), statistics.fmean(values), spread_of(values))


def spread_of(values: Sequence[float]) -> float:
    """The standard deviation of values over runs; 0 for a single one, which has no error bar."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_of(tables: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The mean over runs of tables of equal shape, entry by entry."""
    return [[statistics.fmean(values) for values in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]
