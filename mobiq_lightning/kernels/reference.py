"""Plain-PyTorch product of tokens with a sliced weight, each token at its own depth. Defines correct."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.packing import CODES, PackedWeight, depths_of

_FEW_ROWS = 4  # CPU libraries multiply two or three float32 rows slower than four


def reference_linear(
    x: Tensor,
    packed: PackedWeight,
    bits_per_token: Tensor,
    weight_at: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """`mobiq_lightning.kernels.sliced_linear` of a weight as it is saved: what is correct.

    On a CPU one matmul per depth that occurs, over the tokens that read it. Elsewhere which depths occur is known to the
    device alone, and asking it would make the host wait: one matmul per depth over all tokens, of which each takes its own.

    Args:
        x: (T, I) tokens, any floating dtype.
        packed: The stored weight.
        bits_per_token: (T,) integers, each a depth of ``packed.slice_bits``.
        weight_at: Where to take a dequantized weight (O, I) from instead of unpacking it here, for callers that keep
            them. Not used while a model is compiled.

    Returns:
        (T, O) in the dtype of `x`.
    """
    if torch.compiler.is_compiling():
        sizes = (packed.in_features, packed.group_size, list(packed.slice_bits))
        stored = (list(packed.planes), list(packed.values))
        result: Tensor = _sliced_linear(x, *stored, bits_per_token, *sizes, packed.code)
        return result
    weight_at = weight_at or packed.weight_at
    if x.device.type == "cpu":
        return mixed_depth_product(x, bits_per_token, weight_at, packed.out_features)
    depths = [depth for depth in depths_of(packed.slice_bits) if depth <= len(packed.planes)]
    y = F.linear(x, weight_at(depths[-1]).to(x.dtype))
    for depth in depths[:-1]:
        product = F.linear(x, weight_at(depth).to(x.dtype))
        y = torch.where((bits_per_token == depth).unsqueeze(-1), product, y)
    return y


def mixed_depth_product(
    x: Tensor, bits_per_token: Tensor, weight_at: Callable[[int], Tensor], out_features: int
) -> Tensor:
    """``y[t] = weight_at(bits_per_token[t]) @ x[t]``: one matmul per depth that occurs.

    Args:
        x: (T, I) tokens, any floating dtype.
        bits_per_token: (T,) integers.
        weight_at: Gives the weight (O, I) at a depth.
        out_features: O.

    Returns:
        (T, O) in the dtype of `x`.
    """
    depths = sorted(set(bits_per_token.tolist()))
    if len(depths) == 1:
        return F.linear(x, weight_at(depths[0]).to(x.dtype))
    y = x.new_empty(x.shape[0], out_features)
    for depth in depths:
        tokens = (bits_per_token == depth).nonzero().squeeze(1)
        rows = x[tokens]
        if 1 < len(tokens) < _FEW_ROWS:
            rows = F.pad(rows, (0, 0, 0, _FEW_ROWS - len(tokens)))
        y[tokens] = F.linear(rows, weight_at(depth).to(x.dtype))[: len(tokens)]
    return y


@torch.library.custom_op("mobiq::sliced_linear", mutates_args=())
def _sliced_linear(
    x: Tensor,
    planes: Sequence[Tensor],
    values: Sequence[Tensor],
    bits_per_token: Tensor,
    in_features: int,
    group_size: int,
    slice_bits: Sequence[int],
    code: str,
) -> Tensor:
    """`reference_linear` as one operator: which depths occur is data, which a compiler cannot look through."""
    packed = CODES[code](tuple(planes), tuple(values), in_features, group_size, tuple(slice_bits))
    return reference_linear(x, packed, bits_per_token)


@_sliced_linear.register_fake
def _(x: Tensor, planes: Sequence[Tensor], *_: object) -> Tensor:
    return x.new_empty(x.shape[0], planes[0].shape[0])
