"""Plain-PyTorch product of tokens with a sliced weight, each token at its own depth. Defines correct."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.packing import PackedSlices


def sliced_linear(
    x: Tensor,
    packed: PackedSlices,
    bits_per_token: Tensor,
    weight_at: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """``y[t] = W(bits_per_token[t]) @ x[t]``: one matmul per depth that occurs, over the tokens that read it.

    Args:
        x: (T, I) tokens, any floating dtype.
        packed: The stored weight.
        bits_per_token: (T,) integers, each a depth between 1 and the stored planes.
        weight_at: Where to take a dequantized weight (O, I) from instead of unpacking it here, for callers that keep
            them.

    Returns:
        (T, O) in the dtype of `x`.
    """
    weight_at = weight_at or packed.weight_at
    depths = torch.unique(bits_per_token).tolist()
    if len(depths) == 1:
        return F.linear(x, weight_at(depths[0]).to(x.dtype))
    y = x.new_empty(x.shape[0], packed.out_features)
    for depth in depths:
        tokens = (bits_per_token == depth).nonzero().squeeze(1)
        y[tokens] = F.linear(x[tokens], weight_at(depth).to(x.dtype))
    return y
