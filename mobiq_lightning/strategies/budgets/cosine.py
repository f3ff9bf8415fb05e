"""Half a cosine wave from one budget to another."""

import math

from mobiq_lightning.strategies.budgets.between import BetweenBudgets


class CosineBudget(BetweenBudgets):
    """Goes from `start_bits` to `end_bits` along half a cosine wave: slowly at both ends, fastest in the middle.

    Args:
        start_bits: Average bits per weight at the start of a block.
        end_bits: Average bits per weight at the end of a block.

    Example:
        ``budget: {class_path: CosineBudget, init_args: {start_bits: 6.0, end_bits: 3.0}}``
    """

    def bits_at(self, progress: float) -> float:
        """Average bits per weight at `progress` in [0, 1] through the block, along half a cosine wave."""
        return self.end_bits + (self.start_bits - self.end_bits) * (1 + math.cos(math.pi * progress)) / 2
