"""Any schedule, as a list of points."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from mobiq_lightning.strategies.base import BudgetSchedule


class ListedBudget(BudgetSchedule):
    """Goes in straight lines through listed points; before the first and after the last the budget stays.

    Args:
        points: ``[progress, bits]`` pairs, progress from 0 to 1 and rising. Two points at one progress make a step: from
            there on the second counts.

    Raises:
        ValueError: If there is no point, progress does not rise from 0 to 1, or bits are not finite.

    Example:
        ``budget: {class_path: ListedBudget, init_args: {points: [[0.0, 6.0], [0.5, 4.0], [1.0, 3.0]]}}``
    """

    def __init__(self, points: Sequence[tuple[float, float]] = ((0.0, 6.0), (0.5, 4.0), (1.0, 3.0))) -> None:
        self.points = [(float(progress), float(bits)) for progress, bits in points]
        times = [progress for progress, _ in self.points]
        if not times:
            raise ValueError("points is empty; give [progress, bits] pairs, as in [[0, 6], [1, 3]]")
        if times != sorted(times) or not (times[0] >= 0 and times[-1] <= 1):
            raise ValueError(f"points: progress {times} must rise from 0 to 1")
        if not all(math.isfinite(bits) for _, bits in self.points):
            raise ValueError(f"points: bits {[bits for _, bits in self.points]} must be numbers")

    def bits_at(self, progress: float) -> float:
        """Average bits per weight at `progress` in [0, 1] through the block, between the listed points."""
        after = bisect.bisect_right(self.points, progress, key=lambda point: point[0])
        if after in (0, len(self.points)):
            return self.points[max(0, after - 1)][1]
        (start, low), (end, high) = self.points[after - 1], self.points[after]
        return low + (high - low) * (progress - start) / (end - start)

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest average bits per weight that the schedule can ask for."""
        bits = [bits for _, bits in self.points]
        return min(bits), max(bits)
