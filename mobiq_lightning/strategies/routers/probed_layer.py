"""Depths of layers by probes of the whole model."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mobiq_lightning.runs import GainMethod
from mobiq_lightning.strategies.routers.layer_scores import GainRouter


class ProbedLayerRouter(GainRouter):
    """Layers read deeper where that brings the model nearer to full precision, measured input by input.

    The gain of a slice is by how much the model's KL divergence to full precision rises when this input alone is read without
    it and all others at the depth that it reaches.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.

    Example:
        ``router: {class_path: ProbedLayerRouter}``
    """

    gains_from: ClassVar[GainMethod] = "probes"

    def layer_scores(self) -> Tensor:
        """Scores (S - 1,) float32 of the slices: logarithms of their gains in nats per token, bit and weight."""
        return self.log_rates()
