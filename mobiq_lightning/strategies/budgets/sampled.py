"""A fresh random budget at each step."""

import random

from mobiq_lightning.strategies.base import BudgetSchedule
from mobiq_lightning.strategies.numbers import MOST_BITS, in_range


class SampledBudget(BudgetSchedule):
    """Draws each step's bits uniformly, so that the scores learn to rank tokens at every budget.

    A draw is a function of the seed and the progress alone: a resumed run draws what the interrupted one would have.

    Args:
        low_bits: Lowest average bits per weight.
        high_bits: Highest average bits per weight.
        seed: Seed of the draws.

    Example:
        ``budget: {class_path: SampledBudget, init_args: {low_bits: 2.0, high_bits: 6.0, seed: 0}}``
    """

    def __init__(self, low_bits: float = 2.0, high_bits: float = 6.0, seed: int = 0) -> None:
        in_range("low_bits", low_bits, 0, MOST_BITS)
        in_range("high_bits", high_bits, 0, MOST_BITS)
        if low_bits > high_bits:
            raise ValueError(f"low_bits ({low_bits}) must not exceed high_bits ({high_bits})")
        self.low_bits = low_bits
        self.high_bits = high_bits
        self.seed = seed

    def bits_at(self, progress: float) -> float:
        """Average bits per weight drawn for `progress` in [0, 1] through the block."""
        return random.Random(f"{self.seed}/{progress!r}").uniform(self.low_bits, self.high_bits)

    @property
    def final_bits(self) -> float:
        """Average bits at which a calibrated block feeds the next: the middle of the interval, not a draw."""
        return (self.low_bits + self.high_bits) / 2

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest average bits per weight that the schedule can ask for."""
        return self.low_bits, self.high_bits
