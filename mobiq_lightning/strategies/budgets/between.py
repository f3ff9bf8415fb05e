"""Shared by the schedules that go from one budget to another."""

from __future__ import annotations

from mobiq_lightning.strategies.base import BudgetSchedule
from mobiq_lightning.strategies.numbers import MOST_BITS, in_range


class BetweenBudgets(BudgetSchedule):
    """A schedule from `start_bits` at progress 0 to `end_bits` at progress 1.

    Args:
        start_bits: Average bits per weight at the start of a block.
        end_bits: Average bits per weight at the end of a block.
    """

    def __init__(self, start_bits: float = 6.0, end_bits: float = 3.0) -> None:
        in_range("start_bits", start_bits, 0, MOST_BITS)
        in_range("end_bits", end_bits, 0, MOST_BITS)
        self.start_bits = start_bits
        self.end_bits = end_bits

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest average bits per weight that the schedule can ask for."""
        return min(self.start_bits, self.end_bits), max(self.start_bits, self.end_bits)
