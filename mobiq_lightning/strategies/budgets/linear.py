"""A straight line from one budget to another."""

from mobiq_lightning.strategies.budgets.between import BetweenBudgets


class LinearBudget(BetweenBudgets):
    """Goes in a straight line from `start_bits` to `end_bits`."""

    def bits_at(self, progress: float) -> float:
        """Average bits per weight at `progress`."""
        return self.start_bits + (self.end_bits - self.start_bits) * progress
