"""Depths of layers that are learned end to end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mobiq_lightning.strategies.routers.layer_scores import LayerRouter


class LearnedLayerRouter(LayerRouter):
    """One trainable score for each slice of an input, the same for all tokens, bounded by tanh.

    It learns in stages with `scope: model`, where inputs compete under one threshold. A block alone gives it nothing to
    learn: with a threshold of its own an input reads the depth that the budget says, whatever its scores.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.
        first: Score with which the first slice after the base starts; the last one starts at its negative.

    Example:
        ``router: {class_path: LearnedLayerRouter, init_args: {first: 0.5}}``
    """

    needs_model_stage = True

    def __init__(self, in_features: int, n_slices: int, first: float = 0.5) -> None:
        super().__init__(in_features, n_slices)
        if not 0 <= first < 1:
            raise ValueError(f"first ({first}) must be at least 0 and below 1, the bound of scores")
        start = torch.linspace(first, -first, n_slices - 1) if n_slices > 2 else torch.zeros(n_slices - 1)
        self.raw = nn.Parameter(torch.atanh(start))

    def layer_scores(self) -> Tensor:
        """Trained scores (S - 1,) float32 of the slices, bounded to (-1, 1) by tanh."""
        return torch.tanh(self.raw)
