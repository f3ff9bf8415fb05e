"""Takes routers and controls at equal all-in bits, which count what is stored beside the codes: scales, tables, routers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from mobiq_lightning.comparison.table import FLOOR, NEAR, CellRow, Point, Points
from mobiq_lightning.runs import CONTROLS, Allocation, MeanRow, Row, summarize, value_at

APART = 0.01
"""Bits per weight from which on two stores beside the codes are called different."""


class AllInCurves:
    """The curves of all runs over all-in bits.

    Perplexity and KL divergence are straight lines between the budgets of a run, as a mixture of both gives, and beyond its
    highest budget they are those of that budget, since nobody has to spend all bits. Below its lowest there is nothing, but
    that its lowest may miss the bits asked for by `NEAR`.

    Args:
        rows: Rows of all finished runs.
    """

    def __init__(self, rows: Iterable[CellRow]) -> None:
        of_runs: dict[tuple[str, int], list[Row]] = {}
        for one in rows:
            of_runs.setdefault((one.strategy, one.cell_seed), []).append(one.row)
        self._rows: dict[tuple[str, int, Allocation], list[MeanRow]] = {}
        for run, found in of_runs.items():
            for row in summarize(found):
                self._rows.setdefault((*run, row.allocation), []).append(row)

    def beside(self, strategy: str, *allocations: Allocation) -> float | None:
        """Mean bits per weight that runs of a strategy store beside the codes.

        Args:
            strategy: Name of the strategy.
            *allocations: Whose rows are asked: the router's hold the router, those of controls do not.

        Returns:
            The mean over all its rows, or None if there are none.
        """
        found = [
            row.all_in_bits - row.used_bits
            for (name, _, allocation), rows in self._rows.items()
            if name == strategy and allocation in allocations
            for row in rows
        ]
        return statistics.fmean(found) if found else None

    def against_controls(self, strategy: str, bits: Sequence[float]) -> Points:
        """The points of a strategy's routers at used bits, and those of its controls at the all-in bits that these take.

        Args:
            strategy: Name of the strategy.
            bits: Used bits per weight of the router.

        Returns:
            By strategy, allocation and used bits of the router, the point of each seed that has one.
        """
        points: Points = {}
        for (name, seed, allocation), rows in self._rows.items():
            if name != strategy or allocation != "router":
                continue
            for asked in bits:
                taken = _all_in(rows, asked)
                if taken is None:
                    continue
                allocations: tuple[Allocation, ...] = ("router", *CONTROLS)
                for other in allocations:
                    found = self._point(strategy, seed, other, taken)
                    if found is not None:
                        points.setdefault((strategy, other, asked), {})[seed] = found
        return points

    def of_routers(self, strategies: Sequence[str], all_in_bits: Sequence[float]) -> Points:
        """The points of the routers of strategies at equal all-in bits.

        Args:
            strategies: Names of the strategies.
            all_in_bits: All-in bits per weight.

        Returns:
            By strategy, ``router`` and all-in bits, the point of each seed that can be had for so few.
        """
        points: Points = {}
        for strategy, seed, allocation in self._rows:
            for asked in all_in_bits if allocation == "router" and strategy in strategies else ():
                found = self._point(strategy, seed, "router", asked)
                if found is not None:
                    points.setdefault((strategy, "router", asked), {})[seed] = found
        return points

    def _point(self, strategy: str, seed: int, allocation: Allocation, all_in_bits: float) -> Point | None:
        rows = self._rows.get((strategy, seed, allocation), [])
        if not rows:
            return None
        perplexity = _near(sorted((row.all_in_bits, row.perplexity) for row in rows), all_in_bits)
        kl = _near(sorted((row.all_in_bits, row.kl) for row in rows), all_in_bits)
        return None if perplexity is None or kl is None else Point(max(perplexity, FLOOR), max(kl, FLOOR))


def _all_in(rows: Sequence[MeanRow], used_bits: float) -> float | None:
    """All-in bits of a run's router at some used bits; None where its curve ends more than `NEAR` before."""
    curve = sorted((row.used_bits, row.all_in_bits) for row in rows)
    return _near(curve, used_bits) if used_bits <= curve[-1][0] + NEAR else None


def _near(curve: Sequence[tuple[float, float]], bits: float) -> float | None:
    """The value of a curve at some bits, or that of its first point where this misses them by no more than `NEAR`."""
    lowest = curve[0][0]
    return value_at(curve, max(bits, lowest) if bits >= lowest - NEAR else bits)
