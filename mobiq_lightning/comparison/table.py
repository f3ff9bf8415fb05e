"""Makes the long table of a comparison: each strategy and allocation at equal used bits, mean and spread over seeds."""

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
"""Used bits by which the end of a curve may miss the bits asked for and still be taken for them."""
ALLOCATIONS: tuple[Allocation, ...] = ("full", "rtn", "router", *CONTROLS)
_OVERFLOW = 700.0  # nats; the exponential of more is not finite
FLOOR = 1e-9  # nats; below it the logarithm of a KL divergence is that of rounding errors


@dataclass(frozen=True)
class CellRow:
    """A measured row of one run of the comparison.

    Args:
        strategy: Name of the strategy.
        cell_seed: Seed of the run; the seed of the row is that of what the allocation draws.
        row: The measured row.
    """

    strategy: str
    cell_seed: int
    row: Row


@dataclass(frozen=True)
class TableRow(Record):
    """A row of the long table: mean and spread over the runs of a strategy with one allocation at equal used bits.

    Args:
        strategy: Name of the strategy.
        allocation: Name of what decides how deep tokens read, such as ``router`` or ``random``.
        used_bits: Used bits per weight at which strategies are compared.
        n: Number of runs.
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
        """The mean over runs of a metric, ``perplexity`` or ``kl``."""
        return self.perplexity_mean if metric == "perplexity" else self.kl_mean

    def spread(self, metric: Metric) -> float | None:
        """The standard deviation over seeds of a metric, ``perplexity`` or ``kl``; None for one run."""
        return self.perplexity_spread if metric == "perplexity" else self.kl_spread


@dataclass(frozen=True)
class Point:
    """The perplexity and KL divergence of one run at exact used bits.

    Args:
        perplexity: Perplexity on the evaluation text.
        kl: KL divergence to the full-precision model, nats per token.
    """

    perplexity: float
    kl: float

    def figure(self, metric: Metric) -> float:
        """The value of a metric, ``perplexity`` or ``kl``."""
        return self.perplexity if metric == "perplexity" else self.kl


def at_bits(rows: Sequence[Row], bits: float) -> Point | None:
    """Interpolates a run's perplexity and KL divergence at given used bits on the curve of its rows.

    Between two rows, the logarithms of both are taken to be straight lines in the used bits.

    Args:
        rows: Rows of one run and one allocation.
        bits: Used bits per weight.

    Returns:
        The point, or None if the curve ends more than `NEAR` bits before.
    """
    curve = sorted((float(row.used_bits), _log(row.perplexity), _log(row.kl)) for row in rows)
    if not curve or not curve[0][0] - NEAR <= bits <= curve[-1][0] + NEAR:
        return None
    bits = min(max(bits, curve[0][0]), curve[-1][0])
    below = [point for point in curve if point[0] <= bits][-1]
    above = next(point for point in curve if point[0] >= bits)
    share = 0.0 if above[0] == below[0] else (bits - below[0]) / (above[0] - below[0])
    perplexity, kl = (_mixed(low, high, share) for low, high in zip(below[1:], above[1:], strict=True))
    return Point(perplexity, kl)


def _log(figure: float) -> float:
    """The logarithm of a perplexity or KL divergence; infinite where the figure is not finite, as after a failed run."""
    return math.log(max(figure, FLOOR)) if math.isfinite(figure) else math.inf


def _mixed(low: float, high: float, share: float) -> float:
    """The figure between two logarithms; infinite where one that counts is."""
    if share == 0.0:
        high = low
    return math.exp(low + share * (high - low)) if max(low, high) < _OVERFLOW else math.inf


Points = dict[tuple[str, Allocation, float], dict[int, Point]]
"""The points of all runs: by strategy, allocation and used bits, the point of each seed."""


def points_of(rows: Iterable[CellRow], bits: Iterable[float]) -> Points:
    """Interpolates the runs of every strategy and allocation at equal used bits.

    Round-to-nearest has points at the bits that were measured only, and full precision at its own bits only.

    Args:
        rows: Rows of all finished runs.
        bits: Used bits per weight at which strategies are compared.
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
    """Makes a row for each strategy, allocation and used bits: mean over seeds, and standard deviation as spread."""
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
    """The sample standard deviation of values; None where it is not known: for a single value, or one that is not finite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


@dataclass(frozen=True)
class Lead:
    """How much lower one perplexity is than another, both being compared seed by seed.

    Args:
        mean: Mean over seeds of ``ln(other / one)``, positive where the first one is better.
        spread: Standard deviation of that logarithm over seeds; None with one seed.
        n: Number of seeds.
    """

    mean: float
    spread: float | None
    n: int

    @property
    def says(self) -> str:
        """The verdict ``ahead``, ``behind``, or ``tied`` if the lead is within the spread over seeds or `TIE`."""
        if abs(self.mean) <= max(self.spread or 0.0, TIE):
            return "tied"
        return "ahead" if self.mean > 0 else "behind"

    def __str__(self) -> str:
        percent = 100 * math.expm1(self.mean) if self.mean > 0 else -100 * math.expm1(-self.mean)
        return f"{percent:+.2f} %" + ("" if self.spread is None else f" ± {100 * self.spread:.2f}")


def lead(one: Mapping[int, Point], other: Mapping[int, Point]) -> Lead | None:
    """The lead in perplexity of `one` over `other`, points by seed, where both are finite; None if they nowhere are."""
    seeds = [s for s in sorted(set(one) & set(other)) if math.isfinite(one[s].perplexity + other[s].perplexity)]
    if not seeds:
        return None
    logs = [math.log(other[seed].perplexity / one[seed].perplexity) for seed in seeds]
    return Lead(statistics.fmean(logs), spread(logs), len(logs))
