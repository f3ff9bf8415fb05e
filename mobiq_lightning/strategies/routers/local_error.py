"""Shared by the routers that score a token by the error that the slices make on it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mobiq_lightning.strategies.base import Router

_LEAST_GAIN = 1e-30  # squared error per bit; a slice that gains nothing comes last


class LocalErrorRouter(Router):
    """Scores a slice by the squared error per bit that it takes from the product, from stored factors of the errors.

    For the weight ``W_k`` read with k slices there is a factor ``F_k`` (R, I) with ``|F_k x|^2`` the squared error
    ``|(W - W_k) x|^2`` of a token, exactly or nearly. The error is absolute, over all linears that read the input, and is
    not divided by ``|W x|^2``: a token is ranked by what its error adds to the block. Relative errors hide differences
    between tokens and between inputs, and measured worse on the built-in model: a little with thresholds per layer,
    much with a global one. Under a global threshold absolute errors also say which inputs need bits. This assumes that
    an error does the same harm wherever it is made, which is rough: it paid at few bits and not at 3.5.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.
        n_rows: Rows of each factor, R.
    """

    factors: Tensor
    slice_sizes: Tensor

    def __init__(self, in_features: int, n_slices: int, n_rows: int) -> None:
        super().__init__(in_features, n_slices)
        self.register_buffer("factors", torch.zeros(n_slices, n_rows, in_features))
        self.register_buffer("slice_sizes", torch.ones(n_slices))

    @abstractmethod
    def factor(self, errors: Tensor) -> Tensor:
        """Computes the factors ``F_k`` of the errors ``W - W_k`` that weights read with k slices have.

        Args:
            errors: (S, O, I) float32 errors, on the device of the weights.

        Returns:
            (S, R, I) factors.
        """

    @torch.no_grad()
    def observe_weights(self, weight: Tensor, prefixes: Tensor, slice_bits: Sequence[int]) -> None:
        """Stores the factors of the errors that the slices leave.

        Args:
            weight: (O, I) the full-precision weights of all linears that read the input.
            prefixes: (S, O, I) the same weights read with 1, 2, ... S slices.
            slice_bits: Bits of each slice.
        """
        self.factors.copy_(self.factor(weight.float() - prefixes.float()))
        self.slice_sizes.copy_(torch.tensor(slice_bits))

    def scores(self, x: Tensor) -> Tensor:
        """Scores (..., S - 1) of tokens `x` (..., I): logarithms of the squared error per bit that slices remove."""
        x = x.to(self.factors.dtype)
        products = x @ self.factors.flatten(0, 1).T
        errors = products.unflatten(-1, self.factors.shape[:2]).square().sum(-1)
        gains = (errors[..., :-1] - errors[..., 1:]) / self.slice_sizes[1:]
        scores: Tensor = gains.clamp_min(_LEAST_GAIN).log()
        return scores
