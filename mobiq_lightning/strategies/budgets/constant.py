"""The same budget throughout."""

from mobiq_lightning.strategies.base import BudgetSchedule


class ConstantBudget(BudgetSchedule):
    """Asks for the same bits throughout.

    Args:
        bits: Average bits per weight.
    """

    def __init__(self, bits: float = 3.0) -> None:
        self.bits = bits

    def bits_at(self, progress: float) -> float:
        """Average bits per weight, whatever the progress."""
        return self.bits

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest bits."""
        return self.bits, self.bits
