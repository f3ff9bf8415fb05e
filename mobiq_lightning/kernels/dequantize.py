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
from mobiq_lightning.kernels.layout import ROW_BLOCK, TILE_COLUMNS, WORDS_PER_ROW, KernelWeights
from mobiq_lightning.kernels.unpack import bias_of, scale_of

_TILE = tl.constexpr(TILE_COLUMNS)
_ROW_BLOCK = tl.constexpr(ROW_BLOCK)
_WORDS = tl.constexpr(WORDS_PER_ROW)
_BLOCK_ROWS = 64
WORKSPACE_BYTES = 256 * 2**20
"""Plain weights of all depths that are held at once, at most: more rows are computed in several goes."""


@triton.jit
def _codes(words, unit_stride, SHIFT: tl.constexpr, UNITS: tl.constexpr, HAS_HALF_UNIT: tl.constexpr):
    """Codes [BN * 8] of all UNITS units, two in each 32-bit word, for the pair of columns that begins at bit SHIFT."""
    code = (tl.load(words) >> SHIFT) & 0x00030003
    for unit in tl.static_range(1, UNITS):
        code = (code << 2) | ((tl.load(words + unit * unit_stride) >> SHIFT) & 0x00030003)
    if HAS_HALF_UNIT:
        code = (code >> 1) & 0x7FFF7FFF
    return code


@triton.jit(do_not_specialize=["T", "block0"])
def dequantize_kernel(
    units,
    meta,
    out,
    N,
    K,
    T,
    block0,
    DEPTH: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
):
    """Reads BN rows of one tile of columns to DEPTH bits.

    Args:
        units: (U, T, N * 8) int32 words, see `KernelWeights`.
        meta: (T * 128 / BK, N) int32 words of scale and bias, see `KernelWeights`.
        out: (padded rows, K), takes the plain weights; its row 0 is the first of block `block0`.
        N: Padded rows of the weights.
        K: Columns of the input.
        T: Tiles of 128 columns.
        block0: First block of 128 rows that is computed.
        DEPTH: Bits.
        BN: Rows of a program.
        BK: Columns that share a word of `meta`: 32, 64 or 128.
        GROUP_SIZE: Columns that share a scale.
        PADDED_GROUP: Columns that a group takes in the kernels' order.
    """
    PIECES: tl.constexpr = _TILE // BK
    UNITS: tl.constexpr = (DEPTH + 1) // 2
    HALF: tl.constexpr = DEPTH % 2
    pn = tl.program_id(0)
    t = tl.program_id(1)
    n_out = pn * BN + tl.arange(0, BN)  # [BN]
    first_row = block0 * _ROW_BLOCK + pn * BN
    stride = T * N * _WORDS
    words = units + (t * N + first_row) * _WORDS + tl.arange(0, BN * _WORDS)  # [BN * 8]
    # The indices of the bit layout in `layout`: codes of even j, then of odd j, each with j / 2 in two axes of two.
    even = tl.join(
        tl.join(_codes(words, stride, 0, UNITS, HALF), _codes(words, stride, 8, UNITS, HALF)),
        tl.join(_codes(words, stride, 4, UNITS, HALF), _codes(words, stride, 12, UNITS, HALF)),
    )  # [BN * 8, 2, 2]
    odd = tl.join(
        tl.join(_codes(words, stride, 2, UNITS, HALF), _codes(words, stride, 10, UNITS, HALF)),
        tl.join(_codes(words, stride, 6, UNITS, HALF), _codes(words, stride, 14, UNITS, HALF)),
    )  # [BN * 8, 2, 2]
    pairs = tl.join(even, odd)  # [(BN / 16, r, t, h, c), 2, 2, 2], the last three being j
    codes = tl.join(pairs & 0xFFFF, (pairs >> 16) & 0xFFFF)
    codes = codes.reshape(BN // 16, 8, 4, 2, 16, 2)  # [BN / 16, r, t, h, (c, j), p]
    codes = tl.permute(codes, 0, 3, 1, 4, 2, 5).reshape(BN, PIECES, BK)
    # Multiples of 2^-9 below 1: exact, and so is their product with a bfloat16.
    position = (codes.to(tl.float32) + 0.5) * (0.5**DEPTH) - 0.5  # [BN, PIECES, BK]
    step = t * PIECES + tl.arange(0, PIECES)  # [PIECES]
    scale_and_bias = tl.load(meta + step[None, :] * N + (first_row + tl.arange(0, BN))[:, None])  # [BN, PIECES]
    weight = scale_of(scale_and_bias)[:, :, None] * position + bias_of(scale_and_bias)[:, :, None]
    weight = weight.reshape(BN, _TILE)
    k = t * _TILE + tl.arange(0, _TILE)  # [128]
    column = (k // PADDED_GROUP) * GROUP_SIZE + k % PADDED_GROUP  # [128] columns of the input
    is_column = (k % PADDED_GROUP < GROUP_SIZE) & (column < K)
    at = out + n_out[:, None].to(tl.int64) * K + column[None, :]  # [BN, 128]
    tl.store(at, weight.to(out.dtype.element_ty), mask=is_column[None, :])


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
        weights: Weights in the kernels' order.
        depth: Bits that are read, one of `weights.depths`.
        dtype: dtype of the result.
        block0: First block of 128 padded rows that is computed.
        rows: Padded rows that are computed from there on; by default all.
        out: (rows, I) memory that takes the result; by default new memory.

    Returns:
        (rows, I).
    """
    rows = weights.rows - block0 * ROW_BLOCK if rows is None else rows
    if out is None:
        out = torch.empty(rows, weights.in_features, dtype=dtype, device=weights.units.device)
    dequantize_kernel[(rows // _BLOCK_ROWS, weights.tiles)](
        units=weights.units,
        meta=weights.meta,
        out=out,
        N=weights.rows,
        K=weights.in_features,
        T=weights.tiles,
        block0=block0,
        DEPTH=depth,
        BN=_BLOCK_ROWS,
        BK=weights.step,
        GROUP_SIZE=weights.group_size,
        PADDED_GROUP=weights.padded_group,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def dequantized_product(
    x: Tensor, weights: KernelWeights, plan: Plan, block0: int = 0, rows: int | None = None
) -> Tensor:
    """Multiplies tokens of several depths: plain weights at every depth, one grouped product over sorted tokens.

    Args:
        x: (M, I) tokens.
        weights: Weights in the kernels' order.
        plan: How `plan_tiles` sorted these tokens.
        block0: First block of 128 padded rows that is computed.
        rows: Padded rows that are computed from there on; by default all.

    Returns:
        (M, rows) in the dtype of `x`.
    """
    rows = weights.rows - block0 * ROW_BLOCK if rows is None else rows
    depths = weights.depths
    ordered = x[plan.order]
    ends = torch.stack([plan.offsets[depth] for depth in depths])
    y = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    per_block = len(depths) * ROW_BLOCK * weights.in_features * x.element_size()
    at_once = ROW_BLOCK * max(1, WORKSPACE_BYTES // per_block)
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        plain = torch.empty(len(depths), count, weights.in_features, dtype=x.dtype, device=x.device)
        for index, depth in enumerate(depths):
            dequantize(weights, depth, x.dtype, block0 + start // ROW_BLOCK, count, plain[index])
        y[:, start : start + count].index_copy_(0, plan.order.long(), F.grouped_mm(ordered, plain.mT, offs=ends))
    return y
