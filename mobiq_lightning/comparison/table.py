"""The long table of a comparison: every strategy and allocation at equal used bits, mean and spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mobiq_lightning.runs import CONTROLS, TIE, Allocation, Metric, Record, Row

INTERPOLATION = (
    "Between two measured points of a curve, the logarithms of perplexity and of KL are taken to be straight lines in the "
    "used bits; each run is interpolated on its own curve. Nothing is extrapolated: where a curve ends within 0.05 bits of "
    "the bits asked for, its end is taken, and where it ends before, the table has no entry."
)
NEAR = 0.05
"""Bits by which the end of a curve may miss the bits asked for."""
ALLOCATIONS: tuple[Allocation, ...] = ("full", "rtn", "router", *CONTROLS)
_FLOOR = 1e-9  # nats; below it the logarithm of a KL divergence is that of rounding errors


@dataclass(frozen=True)
class CellRow:
    """A row of a run of the comparison.

    Args:
        strategy: Name of the strategy.
        cell_seed: Seed of the run; that of the row is the seed of what is drawn in it.
        row: What was measured.
    """

    strategy: str
    cell_seed: int
    row: Row


@dataclass(frozen=True)
class TableRow(Record):
    """What the runs of a strategy give at equal used bits, of one allocation.

    Args:
        strategy: Name of the strategy.
        allocation: Who decides how deep tokens read.
        used_bits: Used bits at which strategies are compared.
        n: Runs.
        perplexity_mean: Mean perplexity over runs.
        perplexity_spread: Standard deviation of the perplexity over seeds; None for one run, whose spread nobody knows.
        kl_mean: Mean KL divergence to full precision, nats per token.
        kl_spread: Standard deviation of the KL divergence over seeds; None for one run.
    """

    strategy: str
    allocation: Allocation
    used_bits: float
    n: int
    perplexity_mean: float
    perplexity_spread: float | None
    kl_mean: float
    kl_spread: float | None

    def mean(self, metric: Metric) -> float:
        """Mean of a metric over runs."""
        return self.perplexity_mean if metric == "perplexity" else self.kl_mean

    def spread(self, metric: Metric) -> float | None:
        """Standard deviation of a metric over seeds; None for one run."""
        return self.perplexity_spread if metric == "perplexity" else self.kl_spread


@dataclass(frozen=True)
class Point:
    """One run's perplexity and KL at exact used bits.

    Args:
        perplexity: On the evaluation text.
        kl: Nats per token to the full-precision model.
    """

    perplexity: float
    kl: float

    def figure(self, metric: Metric) -> float:
        """The figure of a metric."""
        return self.perplexity if metric == "perplexity" else self.kl


def at_bits(rows: Sequence[Row], bits: float) -> Point | None:
    """A run's perplexity and KL at `bits` used bits, interpolated on the curve of its rows.

    Args:
        rows: Rows of one run and one allocation.
        bits: Used bits.

    Returns:
        None if the curve does not reach them.
    """
    curve = sorted((float(row.used_bits), math.log(row.perplexity), math.log(max(row.kl, _FLOOR))) for row in rows)
    if not curve or not curve[0][0] - NEAR <= bits <= curve[-1][0] + NEAR:
        return None
    bits = min(max(bits, curve[0][0]), curve[-1][0])
    below = [point for point in curve if point[0] <= bits][-1]
    above = next(point for point in curve if point[0] >= bits)
    share = 0.0 if above[0] == below[0] else (bits - below[0]) / (above[0] - below[0])
    perplexity, kl = (math.exp(low + share * (high - low)) for low, high in zip(below[1:], above[1:], strict=True))
    return Point(perplexity, kl)


Points = dict[tuple[str, Allocation, float], dict[int, Point]]
"""By strategy, allocation and used bits: the point of each seed."""


def points_of(rows: Iterable[CellRow], bits: Iterable[float]) -> Points:
    """Points of every strategy and allocation at equal used bits.

    Args:
        rows: Rows of all finished runs.
        bits: Used bits.
    """
    curves: dict[tuple[str, Allocation, int], list[Row]] = {}
    for one in rows:
        curves.setdefault((one.strategy, one.row.allocation, one.cell_seed), []).append(one.row)
    points: Points = {}
    for (strategy, allocation, seed), curve in curves.items():
        for asked in [float(curve[0].used_bits)] if allocation == "full" else bits:
            found = at_bits(curve, asked)
            exact = allocation != "rtn" or any(row.used_bits == asked for row in curve)  # rtn has whole bits only
            if found is not None and exact:
                points.setdefault((strategy, allocation, asked), {})[seed] = found
    return points


def long_table(points: Points) -> list[TableRow]:
    """One row for each strategy, allocation and used bits: mean over seeds, and their standard deviation as spread."""
    table = []
    for (strategy, allocation, bits), by_seed in points.items():
        perplexity, kl = [point.perplexity for point in by_seed.values()], [point.kl for point in by_seed.values()]
        table.append(
            TableRow(
                strategy=strategy,
                allocation=allocation,
                used_bits=bits,
                n=len(by_seed),
                perplexity_mean=statistics.fmean(perplexity),
                perplexity_spread=spread(perplexity),
                kl_mean=statistics.fmean(kl),
                kl_spread=spread(kl),
            )
        )
    strategies = list(dict.fromkeys(row.strategy for row in table))
    return sorted(
        table,
        key=lambda row: (
            row.allocation != "full",
            row.used_bits,
            strategies.index(row.strategy),
            ALLOCATIONS.index(row.allocation),
        ),
    )


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for one value, whose spread nobody knows."""
    return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Lead:
    """How much lower one perplexity is than another, paired by seed.

    Args:
        mean: Mean over seeds of ``ln(other / one)``: positive where the one is better.
        spread: Standard deviation of that over seeds; None with one seed.
        n: Seeds.
    """

    mean: float
    spread: float | None
    n: int

    @property
    def says(self) -> str:
        """``ahead``, ``behind``, or ``tied``: within the spread over seeds, or within what a run calls a tie anyway."""
        if abs(self.mean) <= max(self.spread or 0.0, TIE):
            return "tied"
        return "ahead" if self.mean > 0 else "behind"

    def __str__(self) -> str:
        percent = 100 * math.expm1(self.mean) if self.mean > 0 else -100 * math.expm1(-self.mean)
        return f"{percent:+.2f} %" + ("" if self.spread is None else f" ± {100 * self.spread:.2f}")


def lead(one: Mapping[int, Point], other: Mapping[int, Point]) -> Lead | None:
    """The lead of `one` over `other` on the seeds that both have."""
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return None
    logs = [math.log(other[seed].perplexity / one[seed].perplexity) for seed in seeds]
    return Lead(statistics.fmean(logs), spread(logs), len(logs))
