"""Depths of layers by probes of the whole model."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mobiq_lightning.runs import GainMethod
from mobiq_lightning.strategies.routers.layer_scores import GainRouter


class ProbedLayerRouter(GainRouter):
    """Layers read deeper where that brings the model nearer to full precision, measured input by input.

    The gain of a slice is what it takes from the model's KL divergence to full precision when this input alone is read with
    it and all others at one reference depth. See `layer_gains.token_gains`.

    Args:
        in_features: I.
        n_slices: S.
    """

    gains_from: ClassVar[GainMethod] = "probes"

    def layer_scores(self) -> Tensor:
        """See `LayerRouter.layer_scores`."""
        return self.log_rates()
