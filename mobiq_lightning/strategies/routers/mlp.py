"""MoBiRoute: a two-layer MLP that scores tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.routers.features import token_features


class MLPRouter(Router):
    """``Linear(I + 1 -> hidden) - SiLU - Linear(hidden -> S - 1)`` (MoBiRoute, arXiv 2602.20191, section 3).

    It sees `token_features`: the input RMS-normalised, with the logarithm of its RMS appended.

    Args:
        in_features: I.
        n_slices: S.
        hidden_features: Width of the hidden layer.
    """

    def __init__(self, in_features: int, n_slices: int, hidden_features: int = 16) -> None:
        super().__init__(in_features, n_slices)
        self.hidden = nn.Linear(in_features + 1, hidden_features)
        self.score = nn.Linear(hidden_features, n_slices - 1)
        # Finer slices start with lower scores, so that at first tokens differ by one slice, as cheap mixes do.
        with torch.no_grad():
            self.score.weight.mul_(0.1)
            self.score.bias.copy_(-torch.arange(n_slices - 1.0))

    def scores(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., S - 1)."""
        scores: Tensor = self.score(F.silu(self.hidden(token_features(x, self.hidden.weight.dtype))))
        return scores

    def two_layers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Router.two_layers`."""
        return self.hidden.weight, self.hidden.bias, self.score.weight, self.score.bias
