"""The guard that looks at weights before they are sliced: one that is far larger than its neighbours costs them their bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mobiq_lightning.calibration.guarding.fallback import State
from mobiq_lightning.calibration.guarding.guard import Guard, Sighting

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration

OUTLIER_RATIO = 1000.0
"""How many times the typical magnitude is too much. From 510 times, the 255 steps of 8 bits are each more than twice as large
as a typical weight; the outliers of published models stay below 200 times."""


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a linear before it is sliced.

    Args:
        name: Name of the linear.
        weight: (O, I) the weight.
        highest_depth: Highest depth at which it can be read, in bits.
    """

    name: str
    weight: Tensor
    highest_depth: int


class OutlierWeight(Guard[LinearWeight]):
    """Notices a single weight so large that a range which holds it has no steps left for the weights beside it."""

    name = "outlier_weight"
    advice = "Compare that weight with the model it was made from; if it is damage, get the model again"
    limit = OUTLIER_RATIO

    def look(self, looked: LinearWeight) -> list[Sighting]:
        """A sighting if the largest weight of the linear is too many times the typical magnitude."""
        ratio = outlier_ratio(looked.weight)
        return [Sighting(looked.highest_depth, ratio, self.limit, looked.name)] if ratio > self.limit else []

    def can_repair(self, module: ElasticCalibration, before: State | None) -> bool:
        """Never: which weight is right, nobody here knows."""
        return False

    def repair(self, module: ElasticCalibration, before: State | None) -> None:
        """Does nothing."""


@torch.no_grad()
def outlier_ratio(weight: Tensor) -> float:
    """How many times the typical magnitude the largest magnitude of a weight is.

    Typical is what is larger: the median magnitude of the weights in the same row, or the median over rows of their mean
    magnitude. A whole row, or a whole linear, of large weights is no outlier. 0 where the typical magnitude is 0.

    Args:
        weight: (O, I).
    """
    low, high = torch.aminmax(weight, dim=1)
    largest = torch.maximum(low.abs(), high.abs()).float()
    of_linear = weight.abs().mean(dim=1, dtype=torch.float32).median()
    if not float(of_linear) > 0:
        return 0.0
    row = int(largest.argmax())
    of_row = weight[row].abs().float().median()
    return float(largest[row] / torch.maximum(of_row, of_linear))
