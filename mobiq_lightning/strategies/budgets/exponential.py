"""Exponential decay from one budget to another."""

import math

from mobiq_lightning.strategies.budgets.between import BetweenBudgets
from mobiq_lightning.strategies.numbers import in_range


class ExponentialBudget(BetweenBudgets):
    """Goes from `start_bits` to `end_bits` exponentially: fast at first, then ever slower.

    Args:
        start_bits: Average bits per weight at the start of a block.
        end_bits: Average bits per weight at the end of a block.
        rate: Speed of the decay, above 0: before it is scaled to end at 0, the distance to the end shrinks by
            ``exp(-rate)``.

    Example:
        ``budget: {class_path: ExponentialBudget, init_args: {start_bits: 6.0, end_bits: 3.0, rate: 4.0}}``
    """

    def __init__(self, start_bits: float = 6.0, end_bits: float = 3.0, rate: float = 4.0) -> None:
        super().__init__(start_bits, end_bits)
        in_range("rate", rate, 0, 100, above=True)
        self.rate = rate

    def bits_at(self, progress: float) -> float:
        """Average bits per weight at `progress` in [0, 1] through the block, along an exponential decay."""
        floor = math.exp(-self.rate)
        left = (math.exp(-self.rate * progress) - floor) / (1 - floor)
        return self.end_bits + (self.start_bits - self.end_bits) * left
