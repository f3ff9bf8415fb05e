"""A router of one layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.routers.features import token_features


class LinearRouter(Router):
    """A trained router of one layer, ``Linear(I + 1 -> S - 1)``, on the RMS-normalised input and its log RMS.

    It is MoBiRoute (arXiv 2602.20191, section 3) without the hidden layer: it shows how far a direction of the input is
    enough to route by.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.

    Example:
        ``router: {class_path: LinearRouter}``
    """

    def __init__(self, in_features: int, n_slices: int) -> None:
        super().__init__(in_features, n_slices)
        self.score = nn.Linear(in_features + 1, n_slices - 1)
        # Finer slices start with lower scores, so that at first tokens differ by one slice, as cheap mixes do.
        with torch.no_grad():
            self.score.weight.mul_(0.1)
            self.score.bias.copy_(-torch.arange(n_slices - 1.0))

    def scores(self, x: Tensor) -> Tensor:
        """Scores (..., S - 1) of the slices after the first, from one linear layer, for tokens `x` (..., I)."""
        scores: Tensor = self.score(token_features(x, self.score.weight.dtype))
        return scores
