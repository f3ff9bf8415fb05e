"""A straight line from one budget to another."""

from mobiq_lightning.strategies.budgets.between import BetweenBudgets


class LinearBudget(BetweenBudgets):
    """Goes in a straight line from `start_bits` to `end_bits`.

    Args:
        start_bits: Average bits per weight at the start of a block.
        end_bits: Average bits per weight at the end of a block.

    Example:
        ``budget: {class_path: LinearBudget, init_args: {start_bits: 6.0, end_bits: 3.0}}``
    """

    def bits_at(self, progress: float) -> float:
        """Average bits per weight at `progress` in [0, 1] through the block, in a straight line."""
        return self.start_bits + (self.end_bits - self.start_bits) * progress
