"""What a routing decision needs besides the token, in the kernels' order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mobiq_lightning.kernels.layout import TILE_COLUMNS, KernelWeights, column_map

MAX_ROUTED = 64
"""Tokens that one launch can route, and that `decode` takes."""
_COUNTERS = MAX_ROUTED + 1  # one for each token, and one for all of them


@dataclass(frozen=True)
class TwoLayerWeights:
    """Weights of a router ``score(silu(hidden([x / rms(x), log rms(x)])))``.

    Args:
        hidden_weight: (H, I + 1); the last column is multiplied with log rms(x).
        hidden_bias: (H,) bias of the hidden layer.
        score_weight: (S - 1, H); the first slice is always read and has no score.
        score_bias: (S - 1,) bias of the scores.
    """

    hidden_weight: Tensor
    hidden_bias: Tensor
    score_weight: Tensor
    score_bias: Tensor


@dataclass(frozen=True)
class RouterWeights:
    """Weights of a router of two layers in the kernels' order, float32.

    Args:
        hidden: (T * 128, W): weights of the columns in the kernels' order, before `prepare` places them; W is H padded.
        small: Rows of W: weights of log(rms), biases of the hidden layer, weights of each score; then the scores' biases.
        depths: (S,) int32, bits read with 1, 2, ... slices.
        counters: (65,) int32 zeros; a router must not be used by two streams at once.
        width: Units W of the hidden layer, padded to a power of two of at least 16.
    """

    hidden: Tensor
    small: Tensor
    depths: Tensor
    counters: Tensor
    width: int


@dataclass(frozen=True)
class Routing:
    """A router with where its dial stands and what it counts.

    Args:
        router: Weights of the router.
        thresholds: (R,) float32, one for each row of the batch, or one.
        bits_read: (R,) int64, increased by the bits that tokens read.
        tokens_read: (R,) int64, increased by the tokens.
        valid: (M,) integers, 0 for tokens that are not counted; None to count nothing.
    """

    router: RouterWeights
    thresholds: Tensor
    bits_read: Tensor
    tokens_read: Tensor
    valid: Tensor | None


def relay_router(router: TwoLayerWeights, weights: KernelWeights) -> RouterWeights:
    """Brings a router into the kernels' order.

    Args:
        router: Scores at least the slices that `weights` holds.
        weights: Weights of the linears that it decides for, in the kernels' order.
    """
    hidden = router.hidden_weight.detach().float()
    n_hidden, columns = hidden.shape
    width = max(16, 1 << (n_hidden - 1).bit_length())
    n_scores = len(weights.slice_bits) - 1
    padded_scores = 1 << max(1, (len(weights.slice_bits) - 1).bit_length())
    source = column_map(weights).to(hidden.device)
    spread = hidden.new_zeros(weights.tiles * TILE_COLUMNS, width)
    spread[source >= 0, :n_hidden] = hidden[:, source[source >= 0]].t()
    small = hidden.new_zeros(2 + padded_scores, width)
    small[0, :n_hidden] = hidden[:, columns - 1]
    small[1, :n_hidden] = router.hidden_bias.detach().float()
    small[2 : 2 + n_scores, :n_hidden] = router.score_weight.detach().float()[:n_scores]
    biases = hidden.new_zeros(padded_scores)
    biases[:n_scores] = router.score_bias.detach().float()[:n_scores]
    device = weights.units.device
    return RouterWeights(
        spread.to(device),
        torch.cat([small.flatten(), biases]).to(device),
        torch.tensor(weights.depths, dtype=torch.int32, device=device),
        torch.zeros(_COUNTERS, dtype=torch.int32, device=device),
        width,
    )
