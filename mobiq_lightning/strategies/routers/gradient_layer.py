"""Depths of layers by squared gradients."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mobiq_lightning.runs import GainMethod
from mobiq_lightning.strategies.routers.layer_scores import GainRouter


class GradientLayerRouter(GainRouter):
    """Layers read deeper where weights that slices change have large squared gradients (an empirical Fisher diagonal).

    The gain of a slice is second order: half the sum over weights of the squared gradient times what the slice takes from
    the squared error of the weight.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.

    Example:
        ``router: {class_path: GradientLayerRouter}``
    """

    gains_from: ClassVar[GainMethod] = "gradients"

    def layer_scores(self) -> Tensor:
        """Scores (S - 1,) float32 of the slices: logarithms of their gains in nats per token, bit and weight."""
        return self.log_rates()
