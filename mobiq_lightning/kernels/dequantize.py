"""Weights in the kernels' order as a plain matrix at one depth, for products with so many tokens that reading the weights
no longer counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.kernels.grouped import Plan
from mobiq_lightning.kernels.layout import TILE_COLUMNS, KernelWeights
from mobiq_lightning.kernels.unpack import bias_of, scale_of

_TILE = tl.constexpr(TILE_COLUMNS)
_BLOCK_ROWS = 64
WORKSPACE_BYTES = 256 * 2**20
"""Plain weights of all depths that are held at once, at most: more rows are computed in several goes."""


@triton.jit
def _codes(base, stride, SHIFT: tl.constexpr, UNITS: tl.constexpr, HALF: tl.constexpr):
    """Pairs of codes, one in each half of a word."""
    code = (tl.load(base) >> SHIFT) & 0x00030003
    for unit in tl.static_range(1, UNITS):
        code = (code << 2) | ((tl.load(base + unit * stride) >> SHIFT) & 0x00030003)
    if HALF:
        code = (code >> 1) & 0x7FFF7FFF
    return code


@triton.jit(do_not_specialize=["T", "block0"])
def dequantize_kernel(
    units,
    meta,
    out,
    R,
    K,
    T,
    block0,
    DEPTH: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: BN rows of one tile of columns, read to DEPTH bits into `out` (rows, K)."""
    NB: tl.constexpr = BN // 16
    PIECES: tl.constexpr = _TILE // STEP
    UNITS: tl.constexpr = (DEPTH + 1) // 2
    HALF: tl.constexpr = DEPTH % 2
    pn = tl.program_id(0)
    t = tl.program_id(1)
    ry = pn * BN + tl.arange(0, BN)
    row0 = block0 * 128 + pn * BN
    stride = T * R * 8
    base = units + (t * R + row0) * 8 + tl.arange(0, BN * 8)
    even = tl.join(
        tl.join(_codes(base, stride, 0, UNITS, HALF), _codes(base, stride, 8, UNITS, HALF)),
        tl.join(_codes(base, stride, 4, UNITS, HALF), _codes(base, stride, 12, UNITS, HALF)),
    )
    odd = tl.join(
        tl.join(_codes(base, stride, 2, UNITS, HALF), _codes(base, stride, 10, UNITS, HALF)),
        tl.join(_codes(base, stride, 6, UNITS, HALF), _codes(base, stride, 14, UNITS, HALF)),
    )
    pairs = tl.join(even, odd)  # nb r t h c, then the bits of j
    codes = tl.join(pairs & 0xFFFF, (pairs >> 16) & 0xFFFF).reshape(NB, 8, 4, 2, 16, 2)
    codes = tl.permute(codes, 0, 3, 1, 4, 2, 5).reshape(NB * 16, PIECES, STEP)
    # Multiples of 2^-9 below 1: exact, and so is their product with a bfloat16.
    position = (codes.to(tl.float32) + 0.5) * (0.5**DEPTH) - 0.5
    step = t * PIECES + tl.arange(0, PIECES)
    mv = tl.load(meta + step[None, :] * R + (row0 + tl.arange(0, BN))[:, None])
    weight = (scale_of(mv)[:, :, None] * position + bias_of(mv)[:, :, None]).reshape(NB * 16, _TILE)
    k = t * _TILE + tl.arange(0, _TILE)
    column = (k // PADDED) * GROUP + k % PADDED
    ok = (k % PADDED < GROUP) & (column < K)
    at = out + ry[:, None].to(tl.int64) * K + column[None, :]
    tl.store(at, weight.to(out.dtype.element_ty), mask=ok[None, :])


def dequantize(
    weights: KernelWeights,
    depth: int,
    dtype: torch.dtype,
    block0: int = 0,
    rows: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The plain weight read to `depth` bits; in float32 the same bits as `PackedSlices.weight_at`.

    Args:
        weights: In the kernels' order.
        depth: Bits, one of `weights.depths`.
        dtype: Of the result.
        block0: First block of 128 padded rows.
        rows: Padded rows from there on; by default all.
        out: Where to, (rows, I).

    Returns:
        (rows, I).
    """
    rows = weights.rows - block0 * 128 if rows is None else rows
    if out is None:
        out = torch.empty(rows, weights.in_features, dtype=dtype, device=weights.units.device)
    dequantize_kernel[(rows // _BLOCK_ROWS, weights.tiles)](
        weights.units,
        weights.meta,
        out,
        weights.rows,
        weights.in_features,
        weights.tiles,
        block0,
        DEPTH=depth,
        BN=_BLOCK_ROWS,
        GROUP=weights.group_size,
        PADDED=weights.padded_group,
        STEP=weights.step,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def dequantized_product(
    x: Tensor, weights: KernelWeights, plan: Plan, block0: int = 0, rows: int | None = None
) -> Tensor:
    """Tokens of several depths times weights: plain weights at every depth, one grouped product over sorted tokens.

    Args:
        x: (M, I) tokens.
        weights: In the kernels' order.
        plan: Of these tokens.
        block0: First block of 128 padded rows that is computed.
        rows: Padded rows from there on; by default all.

    Returns:
        (M, rows) in the dtype of `x`.
    """
    rows = weights.rows - block0 * 128 if rows is None else rows
    depths = weights.depths
    ordered = x[plan.order]
    ends = torch.stack([plan.offsets[depth] for depth in depths])
    y = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    per_block = len(depths) * 128 * weights.in_features * x.element_size()
    at_once = 128 * max(1, WORKSPACE_BYTES // per_block)
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        plain = torch.empty(len(depths), count, weights.in_features, dtype=x.dtype, device=x.device)
        for index, depth in enumerate(depths):
            dequantize(weights, depth, x.dtype, block0 + start // 128, count, plain[index])
        y[:, start : start + count].index_copy_(0, plan.order.long(), F.grouped_mm(ordered, plain.mT, offs=ends))
    return y
