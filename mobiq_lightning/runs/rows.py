"""Rows of a comparison: what was measured of each allocation at each budget, and what allocations are called."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from mobiq_lightning.runs.record import Record, at_least

Control = Literal["static", "layers", "shuffled", "random"]
CONTROLS: tuple[Control, ...] = get_args(Control)
"""Allocations that a router has to beat at the bits that it used, as far as they were measured."""

Allocation = Literal["full", "rtn", "router", "static", "layers", "shuffled", "random"]
"""Who decides how many bits of each weight a token reads."""

Metric = Literal["perplexity", "kl"]
"""A figure of a row that charts and tables show."""

MOST_BITS = 64
"""Bits of a weight in full precision at most."""

TIE = 0.001
"""Relative difference in perplexity below which two allocations count as equal."""

LABELS: dict[Allocation, str] = {
    "full": "full precision",
    "rtn": "round to nearest",
    "router": "router",
    "static": "static layers",
    "layers": "best layers",
    "shuffled": "shuffled tokens",
    "random": "random tokens",
}
"""What tables and plots call an allocation."""

SHORT: dict[Allocation, str] = {**LABELS, "static": "static", "shuffled": "shuffled", "random": "random"}
"""What sentences call an allocation."""


@dataclass(frozen=True)
class Row(Record):
    """What a comparison measured of one allocation at one budget.

    Args:
        allocation: Who decides how deep tokens read.
        target_bits: Bits per weight that were asked for.
        used_bits: Mean code bits per weight that tokens read.
        all_in_bits: Used bits with scales and biases, and for the router with its weights and tables.
        perplexity: Perplexity on the evaluation text.
        kl: KL divergence to the full-precision model, nats per token.
        seed: Seed of what is drawn in the allocation; None where nothing is.
    """

    allocation: Allocation
    target_bits: float = field(metadata=at_least(0, MOST_BITS))
    used_bits: float = field(metadata=at_least(0, MOST_BITS))
    all_in_bits: float = field(metadata=at_least(0))
    perplexity: float = field(metadata=at_least(0, finite=False))
    kl: float
    seed: int | None

    @property
    def finite(self) -> bool:
        """Whether perplexity and KL divergence are numbers that a curve can go through; after a failed run they are not."""
        return 0 < self.perplexity < math.inf and math.isfinite(self.kl)

    def figure(self, metric: Metric) -> float:
        """The figure of a metric."""
        return self.perplexity if metric == "perplexity" else self.kl


COLUMNS = tuple(column.name for column in fields(Row))
"""Columns of results.csv."""


@dataclass(frozen=True)
class MeanRow(Row):
    """Rows that differ only in the seed as one: the mean of their figures, and how much they spread.

    Args:
        spread: Standard deviation of the perplexity over seeds; 0 with one seed, NaN where one is not finite.
        n_seeds: Rows that it is a mean of.
    """

    spread: float
    n_seeds: int


def summarize(rows: Iterable[Row]) -> list[MeanRow]:
    """Merges rows that differ only in the seed.

    Returns:
        Full precision first, then by the bits asked for, then in the order of `LABELS`.
    """
    merged: dict[tuple[Allocation, float], list[Row]] = {}
    for row in rows:
        merged.setdefault((row.allocation, row.target_bits), []).append(row)
    summary = [
        MeanRow(
            allocation=group[0].allocation,
            target_bits=group[0].target_bits,
            used_bits=statistics.fmean(row.used_bits for row in group),
            all_in_bits=statistics.fmean(row.all_in_bits for row in group),
            perplexity=statistics.fmean(row.perplexity for row in group),
            kl=statistics.fmean(row.kl for row in group),
            seed=group[0].seed,
            spread=spread_of([row.perplexity for row in group]),
            n_seeds=len(group),
        )
        for group in merged.values()
    ]
    order = list(LABELS)
    return sorted(summary, key=lambda row: (row.allocation != "full", row.target_bits, order.index(row.allocation)))


def spread_of(values: Sequence[float]) -> float:
    """The standard deviation of values; 0 for a single one, NaN where one of them is not finite."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def label(allocation: Allocation, deployable: bool = True) -> str:
    """What tables call an allocation: a router that cannot be deployed is called so.

    Args:
        allocation: Allocation of a row.
        deployable: Whether the routers of the run can be deployed, see `RouterNote`.
    """
    return LABELS[allocation] if deployable or allocation != "router" else f"{LABELS[allocation]}, not deployable"
