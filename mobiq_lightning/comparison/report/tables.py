"""Makes the tables of a report: figures at equal used bits beside each other, points as measured, strategies, runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mobiq_lightning.comparison.report.input import ReportCell
from mobiq_lightning.comparison.report.runs import Run, Strategy
from mobiq_lightning.comparison.report.style import color_of
from mobiq_lightning.comparison.table import TableRow
from mobiq_lightning.runs import LABELS, Allocation, Metric, Row, spread_of

_DIGITS: dict[Metric, int] = {"perplexity": 2, "kl": 4}
_SHARED = ("full", "rtn")  # the same for all strategies that share model, text and groups
NOTHING = "–"


@dataclass(frozen=True)
class Value:
    """A figure in a table.

    Args:
        text: Mean as text.
        spread: Spread as text, such as ``± 0.12``, or empty.
        n: Number of runs that the mean is over.
        best: Whether no other strategy or allocation is better in its column.
    """

    text: str
    spread: str = ""
    n: int = 0
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table: strategy and allocation, and a figure for every column of used bits.

    Args:
        strategy: Name of the strategy, or several names that share the row; empty for all.
        allocation: Label of the allocation.
        values: Figures in the order of the columns, None where there is none.
    """

    strategy: str
    allocation: str
    values: Sequence[Value | None]


def columns_of(table: Sequence[TableRow]) -> list[float]:
    """The used bits that a long table has rows for, ascending, without those of full precision."""
    return sorted({row.used_bits for row in table if row.allocation != "full"})


def lines_of(table: Sequence[TableRow], metric: Metric) -> list[list[Line]]:
    """Turns a long table into one line per strategy and allocation, grouped by strategy.

    Full precision and rounding come first, once for all strategies that share them, with an empty name if these are all.

    Args:
        table: Rows of the long table.
        metric: Metric whose figures are taken, ``perplexity`` or ``kl``.
    """
    columns = columns_of(table)
    best = _best(table, metric)
    found: dict[tuple[str, Allocation], list[Value | None]] = {}
    for row in table:
        values = found.setdefault((row.strategy, row.allocation), [None] * len(columns))
        value = _value(row, metric, best)
        if row.allocation == "full":
            values[:] = [value] * len(columns)
        else:
            values[columns.index(row.used_bits)] = value
    names, allocations = list(dict.fromkeys(strategy for strategy, _ in found)), list(LABELS)
    ordered = sorted(found.items(), key=lambda item: (names.index(item[0][0]), allocations.index(item[0][1])))
    shared = list(_merged([item for item in ordered if item[0][1] in _SHARED], set(names)))
    own = [Line(s, LABELS[allocation], values) for (s, allocation), values in ordered if allocation not in _SHARED]
    groups = [shared, *([line for line in own if line.strategy == name] for name in names)]
    return [group for group in groups if group]


def _merged(
    found: Sequence[tuple[tuple[str, Allocation], Sequence[Value | None]]], strategies: set[str]
) -> Iterator[Line]:
    """Lines that several strategies share, once."""
    for (strategy, allocation), values in found:
        owners = [s for (s, a), other in found if a == allocation and _texts(other) == _texts(values)]
        if owners[0] == strategy:
            yield Line("" if set(owners) == strategies else ", ".join(owners), LABELS[allocation], values)


def _texts(values: Sequence[Value | None]) -> list[str]:
    return ["" if value is None else value.text for value in values]


def _best(table: Sequence[TableRow], metric: Metric) -> dict[float, float]:
    best: dict[float, float] = {}
    for row in table:
        if row.allocation not in _SHARED:
            best[row.used_bits] = min(row.mean(metric), best.get(row.used_bits, math.inf))
    return best


def _value(row: TableRow, metric: Metric, best: Mapping[float, float]) -> Value:
    mean, spread = row.mean(metric), row.spread(metric)
    wins = row.allocation not in _SHARED and mean == best.get(row.used_bits)
    spread_text = "" if spread is None or row.allocation in _SHARED else f"± {_number(spread, metric)}"
    return Value(_number(mean, metric), spread_text, row.n, wins)


def _number(value: float, metric: Metric) -> str:
    return f"{value:.{_DIGITS[metric]}f}" if value < 1e5 else f"{value:.3g}"  # also says nan


def measured_points(strategies: Sequence[Strategy]) -> list[dict[str, Any]]:
    """Makes a row for every strategy, allocation and budget as measured: means over runs and draws, with spreads."""
    found: list[dict[str, Any]] = []
    for strategy in strategies:
        for (allocation, target), rows in _by_budget(strategy.runs).items():
            point: dict[str, Any] = {
                "strategy": strategy.name,
                "allocation": LABELS[allocation],
                "target": f"{target:g}",
                "n": len(rows),
            }
            point["used_bits"] = f"{sum(row.used_bits for row in rows) / len(rows):.3f}"
            point["all_in_bits"] = f"{sum(row.all_in_bits for row in rows) / len(rows):.3f}"
            for name in _DIGITS:
                values = [row.figure(name) for row in rows]
                spread = f"± {_number(spread_of(values), name)}" if len(values) > 1 else ""
                point[name] = Value(_number(sum(values) / len(values), name), spread)
            found.append(point)
    return found


def _by_budget(runs: Sequence[Run]) -> dict[tuple[Allocation, float], list[Row]]:
    found: dict[tuple[Allocation, float], list[Row]] = {}
    for row in (row for run in runs for row in run.rows):
        found.setdefault((row.allocation, row.target_bits), []).append(row)
    return found


def strategy_rows(cells: Sequence[ReportCell], strategies: Sequence[Strategy]) -> list[dict[str, Any]]:
    """Makes a row for each strategy with its name, its colour and what it changes in the recipe."""
    changes = {cell.strategy: cell.changes for cell in cells}
    return [
        {"name": s.name, "color": color_of(s), "changes": [(k, _as_yaml(v)) for k, v in changes[s.name].items()]}
        for s in strategies
    ]


def run_rows(cells: Sequence[ReportCell]) -> list[dict[str, Any]]:
    """Makes a row for each run with its status, time, memory and folder."""
    return [
        {
            "strategy": cell.strategy,
            "seed": cell.seed,
            "status": cell.status,
            "time": NOTHING if cell.seconds is None else _time(cell.seconds),
            "memory": NOTHING if cell.peak_memory_gb is None else f"{cell.peak_memory_gb:.2f}",
            "folder": str(cell.folder),
        }
        for cell in cells
    ]


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _as_yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def facts_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields names and values of a nested mapping as texts, nested names joined by a space."""
    for name, value in values.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from facts_of(value, f"{label} ")
        else:
            yield label, _as_yaml(value) if isinstance(value, (list, bool)) or value is None else str(value)
