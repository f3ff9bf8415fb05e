"""Half a cosine wave from one budget to another."""

import math

from mobiq_lightning.strategies.budgets.between import BetweenBudgets


class CosineBudget(BetweenBudgets):
    """Goes from `start_bits` to `end_bits` along half a cosine wave: slowly at both ends, fastest in the middle."""

    def bits_at(self, progress: float) -> float:
        """Average bits per weight at `progress`."""
        return self.end_bits + (self.start_bits - self.end_bits) * (1 + math.cos(math.pi * progress)) / 2
