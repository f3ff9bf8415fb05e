"""Equal steps from one budget to another."""

from mobiq_lightning.strategies.budgets.between import BetweenBudgets
from mobiq_lightning.strategies.numbers import in_range


class StepBudget(BetweenBudgets):
    """Goes from `start_bits` to `end_bits` in equal steps of equal length.

    Args:
        start_bits: Average bits per weight at the start of a block.
        end_bits: Average bits per weight at the end of a block.
        steps: Number of plateaus, at least 2.

    Example:
        ``budget: {class_path: StepBudget, init_args: {start_bits: 6.0, end_bits: 3.0, steps: 4}}``
    """

    def __init__(self, start_bits: float = 6.0, end_bits: float = 3.0, steps: int = 4) -> None:
        super().__init__(start_bits, end_bits)
        in_range("steps", steps, 2)
        self.steps = steps

    def bits_at(self, progress: float) -> float:
        """Average bits per weight at `progress` in [0, 1] through the block, on a plateau."""
        plateau = min(int(progress * self.steps), self.steps - 1)
        return self.start_bits + (self.end_bits - self.start_bits) * plateau / (self.steps - 1)
