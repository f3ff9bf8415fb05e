"""Depths of layers by squared gradients."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mobiq_lightning.runs import GainMethod
from mobiq_lightning.strategies.routers.layer_scores import GainRouter


class GradientLayerRouter(GainRouter):
    """Layers read deeper where weights that slices change have large squared gradients (an empirical Fisher diagonal).

    The gain of a slice is second order: half the sum over weights of the squared gradient times what the slice takes from
    the squared error of the weight. See `layer_gains.gradient_gains`.

    Args:
        in_features: I.
        n_slices: S.
    """

    gains_from: ClassVar[GainMethod] = "gradients"

    def layer_scores(self) -> Tensor:
        """See `LayerRouter.layer_scores`."""
        return self.log_rates()
