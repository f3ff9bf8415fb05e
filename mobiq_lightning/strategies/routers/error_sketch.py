"""A rule without training: random projections estimate the error of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from mobiq_lightning.strategies.numbers import in_range
from mobiq_lightning.strategies.routers.local_error import LocalErrorRouter


class ErrorSketchRouter(LocalErrorRouter):
    """Scores tokens without training, by estimates of their error at each depth from a few random projections.

    The squared error ``|(W - W_k) x|^2`` of a token at k slices is estimated as ``|P (W - W_k) x|^2`` with a few random
    rows P (Johnson and Lindenstrauss, 1984). With R rows the estimate has a relative standard deviation of
    ``sqrt(2 / R)`` at most. All depths share the rows, so that differences between them are less noisy than each. The
    products ``P (W - W_k)`` are stored: S x R x I numbers.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.
        n_projections: Number of random rows, R.
        seed: Seed of the random rows; each input draws its own.

    Example:
        ``router: {class_path: ErrorSketchRouter, init_args: {n_projections: 8, seed: 0}}``
    """

    def __init__(self, in_features: int, n_slices: int, n_projections: int = 8, seed: int = 0) -> None:
        in_range("n_projections", n_projections, 1, 2**16)
        super().__init__(in_features, n_slices, n_projections)
        self.seed, self.position = seed, 0

    def place(self, position: int, count: int) -> None:
        """Remembers the position of the input in the model, so that each input draws random rows of its own."""
        self.position = position

    def factor(self, errors: Tensor) -> Tensor:
        """Projects the errors ``W - W_k`` (S, O, I) of the slices onto R random rows: (S, R, I)."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.position)) & 0x7FFF_FFFF_FFFF_FFFF)
        n_rows = self.factors.shape[1]
        rows = torch.randn(n_rows, errors.shape[1], generator=generator) / n_rows**0.5
        factors: Tensor = rows.to(errors.device) @ errors
        return factors
