"""A rule without training: long tokens read deeper."""

from __future__ import annotations

import math

from torch import Tensor

from mobiq_lightning.strategies.allocation import level_scores
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.routers.features import root_mean_square


class NormRouter(Router):
    """Scores a token by the logarithm of its RMS, less a step for every slice.

    If the error of a weight were the same in all directions, that of a product would grow with the norm of the token and
    halve with every bit. Then this rule, with a step of ``ln 2`` times the bits of a slice, would open slices in the
    order of what they gain. Trained routers add to this rule what they learn about directions.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.
        step: Distance between the scores of two neighbouring slices, in units of ln(RMS), above 0; the default is that
            of one-bit slices.

    Example:
        ``router: {class_path: NormRouter, init_args: {step: 0.7}}``
    """

    def __init__(self, in_features: int, n_slices: int, step: float = math.log(2)) -> None:
        super().__init__(in_features, n_slices)
        if not 0 < step < math.inf:
            raise ValueError(f"step ({step}) must be above 0")
        self.step = step

    def scores(self, x: Tensor) -> Tensor:
        """Scores (..., S - 1) of tokens `x` (..., I): the logarithm of the RMS, less `step` for each finer slice."""
        return root_mean_square(x.float()).log() + self.step * level_scores(self.n_slices, x.device)
