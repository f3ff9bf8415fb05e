"""MoBiRoute: a two-layer MLP that scores tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.numbers import in_range
from mobiq_lightning.strategies.routers.features import token_features


class MLPRouter(Router):
    """MoBiRoute (arXiv 2602.20191, section 3): a trained router, ``Linear(I + 1 -> H) - SiLU - Linear(H -> S - 1)``.

    It sees the input RMS-normalised, with the logarithm of its RMS appended.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.
        hidden_features: Width of the hidden layer, H.

    Example:
        ``router: {class_path: MLPRouter, init_args: {hidden_features: 16}}``
    """

    def __init__(self, in_features: int, n_slices: int, hidden_features: int = 16) -> None:
        in_range("hidden_features", hidden_features, 1, 2**16)
        super().__init__(in_features, n_slices)
        self.hidden = nn.Linear(in_features + 1, hidden_features)
        self.score = nn.Linear(hidden_features, n_slices - 1)
        # Finer slices start with lower scores, so that at first tokens differ by one slice, as cheap mixes do.
        with torch.no_grad():
            self.score.weight.mul_(0.1)
            self.score.bias.copy_(-torch.arange(n_slices - 1.0))

    def scores(self, x: Tensor) -> Tensor:
        """Scores (..., S - 1) of the slices after the first, from the two layers, for tokens `x` (..., I)."""
        scores: Tensor = self.score(F.silu(self.hidden(token_features(x, self.hidden.weight.dtype))))
        return scores

    def two_layers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights (H, I + 1), (S - 1, H) and biases (H,), (S - 1,) of both layers: hidden weight and bias first."""
        return self.hidden.weight, self.hidden.bias, self.score.weight, self.score.bias
