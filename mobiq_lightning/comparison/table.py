"""The long table of a comparison: every strategy and allocation at equal used bits, mean and spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mobiq_lightning.runs import CONTROLS, TIE

INTERPOLATION = (
    "Between two measured points of a curve, the logarithms of perplexity and of KL are taken to be straight lines in the "
    "used bits; each run is interpolated on its own curve. Nothing is extrapolated: where a curve ends within 0.05 bits of "
    "the bits asked for, its end is taken, and where it ends before, the table has no entry."
)
NEAR = 0.05
"""Bits by which the end of a curve may miss the bits asked for."""
ALLOCATIONS = ("full", "rtn", "router", *CONTROLS)
_FLOOR = 1e-9  # nats; below it the logarithm of a KL divergence is that of rounding errors

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Point:
    """One run's perplexity and KL at exact used bits.

    Args:
        perplexity: On the evaluation text.
        kl: Nats per token to the full-precision model.
    """

    perplexity: float
    kl: float


def at_bits(rows: Rows, bits: float) -> Point | None:
    """A run's perplexity and KL at `bits` used bits, interpolated on the curve of its rows.

    Args:
        rows: Of one run and one allocation, with used_bits, perplexity and kl; several with the same bits are averaged.
        bits: Used bits.

    Returns:
        None if the curve does not reach them.
    """
    curve = sorted(
        (float(row["used_bits"]), math.log(row["perplexity"]), math.log(max(row["kl"], _FLOOR))) for row in rows
    )
    if not curve or not curve[0][0] - NEAR <= bits <= curve[-1][0] + NEAR:
        return None
    bits = min(max(bits, curve[0][0]), curve[-1][0])
    below = [point for point in curve if point[0] <= bits][-1]
    above = next(point for point in curve if point[0] >= bits)
    share = 0.0 if above[0] == below[0] else (bits - below[0]) / (above[0] - below[0])
    perplexity, kl = (math.exp(low + share * (high - low)) for low, high in zip(below[1:], above[1:], strict=True))
    return Point(perplexity, kl)


Points = dict[tuple[str, str, float], dict[int, Point]]
"""By strategy, allocation and used bits: the point of each seed."""


def points_of(rows: Rows, bits: Iterable[float]) -> Points:
    """Points of every strategy and allocation at equal used bits.

    Args:
        rows: Of all finished runs, with strategy and cell_seed beside what a run's rows have.
        bits: Used bits.
    """
    curves: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        curves.setdefault((row["strategy"], row["allocation"], row["cell_seed"]), []).append(row)
    points: Points = {}
    for (strategy, allocation, seed), curve in curves.items():
        for asked in [float(curve[0]["used_bits"])] if allocation == "full" else bits:
            found = at_bits(curve, asked)
            exact = allocation != "rtn" or any(row["used_bits"] == asked for row in curve)  # rtn has whole bits only
            if found is not None and exact:
                points.setdefault((strategy, allocation, asked), {})[seed] = found
    return points


def long_table(points: Points) -> list[dict[str, Any]]:
    """One row for each strategy, allocation and used bits: mean over seeds, and their standard deviation as spread."""
    table = []
    for (strategy, allocation, bits), by_seed in points.items():
        row: dict[str, Any] = {"strategy": strategy, "allocation": allocation, "used_bits": bits, "n": len(by_seed)}
        for name in ("perplexity", "kl"):
            values = [getattr(point, name) for point in by_seed.values()]
            row[f"{name}_mean"] = statistics.fmean(values)
            row[f"{name}_spread"] = spread(values)
        table.append(row)
    strategies = list(dict.fromkeys(row["strategy"] for row in table))
    return sorted(
        table,
        key=lambda row: (
            row["allocation"] != "full",
            row["used_bits"],
            strategies.index(row["strategy"]),
            ALLOCATIONS.index(row["allocation"]),
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
