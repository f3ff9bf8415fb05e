"""The same budget throughout."""

from mobiq_lightning.strategies.base import BudgetSchedule
from mobiq_lightning.strategies.numbers import MOST_BITS, in_range


class ConstantBudget(BudgetSchedule):
    """Asks for the same bits throughout.

    Args:
        bits: Average bits per weight.

    Example:
        ``budget: {class_path: ConstantBudget, init_args: {bits: 3.0}}``
    """

    def __init__(self, bits: float = 3.0) -> None:
        in_range("bits", bits, 0, MOST_BITS)
        self.bits = bits

    def bits_at(self, progress: float) -> float:
        """Average bits per weight, whatever the progress."""
        return self.bits

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest average bits per weight that the schedule can ask for."""
        return self.bits, self.bits
