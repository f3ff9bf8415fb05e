"""Product of more tokens than `decode` takes: tokens sorted by depth, in tiles of one depth each, units read in pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobiq_lightning.kernels.form import Prepared
from mobiq_lightning.kernels.layout import ROW_BLOCK, WORDS_PER_ROW, KernelWeights
from mobiq_lightning.kernels.step import TWO_UNITS, UPPER_BIT, centre_of, multiply_tile, next_tile

_ROW_BLOCK = tl.constexpr(ROW_BLOCK)
_WORDS = tl.constexpr(WORDS_PER_ROW)
_DEEPEST = 8
BLOCK_ROWS, BLOCK_TOKENS, WARPS = 128, 64, 8
"""Rows, tokens and warps of a program; with tiles of 128 tokens it would spill registers."""
ROW_BLOCKS_TOGETHER = 8
"""Row blocks that all tiles of tokens go through before the next ones, so that their units stay in the cache."""


@dataclass(frozen=True)
class Plan:
    """Which tokens each tile of a grouped product takes, made on the device.

    Its shapes depend on the number of tokens alone, so that the host need not know how they were routed.

    Args:
        order: (M,) int32, tokens sorted by depth.
        depth: (P,) int32, the depth of each tile; 0 for tiles that are left over.
        start: (P,) int32, where in `order` the tile begins.
        count: (P,) int32, its tokens.
        offsets: (9,) int32: how many tokens read at most 0, 1, ... 8 bits.
    """

    order: Tensor
    depth: Tensor
    start: Tensor
    count: Tensor
    offsets: Tensor


def plan_tiles(bits: Tensor, n_depths: int, block: int) -> Plan:
    """Divides tokens into tiles of up to `block` that read the same depth.

    Args:
        bits: (M,) int32 depths, 1 to 8.
        n_depths: How many different depths there may be.
        block: Tokens of a tile.
    """
    tokens = bits.numel()
    n_tiles = triton.cdiv(tokens, block) + n_depths - 1
    depth = torch.arange(_DEEPEST + 1, device=bits.device, dtype=torch.int32)
    order = torch.argsort(bits, stable=True)
    per_depth = (bits[None, :] == depth[:, None]).sum(1, dtype=torch.int32)
    offsets = per_depth.cumsum(0, dtype=torch.int32)
    tiles = (per_depth + block - 1) // block
    tiles_before = tiles.cumsum(0, dtype=torch.int32)
    number = torch.arange(n_tiles, device=bits.device, dtype=torch.int32)
    depth_of = torch.searchsorted(tiles_before, number, right=True)
    used = depth_of <= _DEEPEST
    depth_of = depth_of.clamp(max=_DEEPEST)
    within = (number - (tiles_before - tiles)[depth_of]) * block
    count = torch.minimum(per_depth[depth_of] - within, torch.full_like(within, block))
    return Plan(
        order.int(),
        torch.where(used, depth_of, 0).int(),
        torch.where(used, (offsets - per_depth)[depth_of] + within, 0).int(),
        torch.where(used, count, 0).int(),
        offsets,
    )


@triton.jit(do_not_specialize=["M", "T", "block0"])
def grouped_kernel(
    x_one,
    x_two,
    sums,
    order,
    tile_depth,
    tile_start,
    tile_count,
    units,
    meta,
    y,
    M,
    N,
    N_OUT,
    T,
    block0,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    ROW_BLOCKS_TOGETHER: tl.constexpr,
    HAS_ODD_DEPTHS: tl.constexpr,
    CODES_ARE_SUBNORMAL: tl.constexpr,
    MMA_SYNC_ORDER: tl.constexpr,
    UNSCALE: tl.constexpr,
):
    """Multiplies one tile of up to BM tokens, all of one depth, with BN rows of the weights.

    Args:
        x_one: (M, T * 128) tokens prepared for one unit at a time.
        x_two: (M, T * 128) tokens prepared for two units at once.
        sums: (T * 128 / BK, M) float32 sums of the tokens over each step of columns.
        order: (M,) int32, tokens sorted by depth.
        tile_depth: (P,) int32 depth of each of P tiles of tokens; 0 for tiles that are left over.
        tile_start: (P,) int32, where in `order` each tile begins.
        tile_count: (P,) int32, how many tokens each tile has.
        units: (U, T, N * 8) int32 words, see `KernelWeights`.
        meta: (T * 128 / BK, N) int32 words of scale and bias, see `KernelWeights`.
        y: (M, N_OUT) result; its column 0 is the first row of block `block0`.
        M: Tokens.
        N: Padded rows of the weights.
        N_OUT: Padded rows that are computed.
        T: Tiles of 128 columns.
        block0: First block of 128 rows that is computed.
        BN: Rows of a program.
        BM: Tokens of a tile.
        BK: Columns that are multiplied before a scale is applied: 32, 64 or 128.
        STAGES: Stages of the software pipeline.
        ROW_BLOCKS_TOGETHER: Row blocks that all tiles of tokens go through before the next ones.
        HAS_ODD_DEPTHS: Whether a tile may read the upper bit of a unit alone.
        CODES_ARE_SUBNORMAL: Whether codes are used as subnormal floating-point numbers instead of being converted.
        MMA_SYNC_ORDER: Whether tokens were prepared in the order that ``mma.sync`` wants, instead of that of ``wgmma``.
        UNSCALE: Factor of the sums that makes codes worth what they are.
    """
    DTYPE: tl.constexpr = x_one.dtype.element_ty
    row_blocks = N_OUT // BN
    tiles = tl.num_programs(0) // row_blocks
    pid = tl.program_id(0)
    width = ROW_BLOCKS_TOGETHER * tiles
    first = (pid // width) * ROW_BLOCKS_TOGETHER
    together = tl.minimum(row_blocks - first, ROW_BLOCKS_TOGETHER)
    pn = first + (pid % width) % together
    pt = (pid % width) // together
    depth = tl.load(tile_depth + pt)
    if depth != 0:
        i = tl.arange(0, BM)  # [BM]
        word = tl.arange(0, BN * _WORDS)  # [BN * 8]
        n_out = pn * BN + tl.arange(0, BN)  # [BN]
        n = block0 * _ROW_BLOCK + n_out  # [BN]
        is_token = i < tl.load(tile_count + pt)  # [BM]
        m = tl.load(order + tl.load(tile_start + pt) + i, mask=is_token, other=0).to(tl.int64)  # [BM]
        base = units + (block0 * _ROW_BLOCK + pn * BN) * _WORDS
        unit_stride = T * N * _WORDS
        centre = centre_of(depth)
        whole_units = depth // 2
        acc = tl.zeros([BN, BM], dtype=tl.float32)

        t = 0
        unit = 0
        for _ in tl.range(0, T * ((whole_units + 1) // 2), num_stages=STAGES):
            at = base + unit * unit_stride + t * N * _WORDS + word  # [BN * 8]
            words = tl.load(at)  # [BN * 8]
            # A unit that these tokens do not need is neither read nor counted.
            is_read = word >= tl.where(unit + 1 < whole_units, 0, BN * _WORDS)  # [BN * 8]
            next_words = tl.load(at + unit_stride, mask=is_read, other=0)  # [BN * 8]
            acc = multiply_tile(
                acc, words, next_words, x_two, sums, meta, is_token, centre, m, n, t, unit, M, T, N,
                PASS=TWO_UNITS, BN=BN, BK=BK,
                CODES_ARE_SUBNORMAL=CODES_ARE_SUBNORMAL, MMA_SYNC_ORDER=MMA_SYNC_ORDER, DTYPE=DTYPE,
            )  # fmt: skip
            t, unit = next_tile(t, unit, unit + 2, 0, T, 1)

        if HAS_ODD_DEPTHS:
            for t in tl.range(0, T * (depth % 2), num_stages=STAGES):
                words = tl.load(base + whole_units * unit_stride + t * N * _WORDS + word)  # [BN * 8]
                acc = multiply_tile(
                    acc, words, words, x_one, sums, meta, is_token, centre, m, n, t, whole_units, M, T, N,
                    PASS=UPPER_BIT, BN=BN, BK=BK,
                    CODES_ARE_SUBNORMAL=CODES_ARE_SUBNORMAL, MMA_SYNC_ORDER=MMA_SYNC_ORDER, DTYPE=DTYPE,
                )  # fmt: skip

        acc = acc * UNSCALE
        at = y + m[None, :] * N_OUT + n_out[:, None]  # [BN, BM]
        tl.store(at, acc.to(y.dtype.element_ty), mask=is_token[None, :])


def grouped(
    x: Prepared,
    weights: KernelWeights,
    block0: int = 0,
    rows: int | None = None,
    dtype: torch.dtype | None = None,
    block: int = BLOCK_TOKENS,
) -> Tensor:
    """Multiplies any number of tokens with a sliced weight, each at its own depth.

    Args:
        x: M tokens, prepared for this product.
        weights: Weights in the kernels' order, on the same device.
        block0: First block of 128 padded rows that is computed.
        rows: Padded rows that are computed from there on; by default all.
        dtype: dtype of the result; by default that of the tokens.
        block: Tokens of a tile.

    Returns:
        (M, rows).
    """
    rows = weights.rows - block0 * ROW_BLOCK if rows is None else rows
    tokens = x.bits.shape[0]
    y = torch.empty(tokens, rows, dtype=dtype or x.dtype, device=x.bits.device)
    plan = plan_tiles(x.bits, len(weights.depths), block)
    grouped_kernel[(rows // BLOCK_ROWS * len(plan.depth),)](
        x_one=x.one,
        x_two=x.two,
        sums=x.sums,
        order=plan.order,
        tile_depth=plan.depth,
        tile_start=plan.start,
        tile_count=plan.count,
        units=weights.units,
        meta=weights.meta,
        y=y,
        M=tokens,
        N=weights.rows,
        N_OUT=rows,
        T=weights.tiles,
        block0=block0,
        BN=BLOCK_ROWS,
        BM=block,
        BK=weights.step,
        STAGES=3,
        ROW_BLOCKS_TOGETHER=ROW_BLOCKS_TOGETHER,
        HAS_ODD_DEPTHS=any(depth % 2 for depth in weights.depths),
        CODES_ARE_SUBNORMAL=x.form.codes_are_subnormal,
        MMA_SYNC_ORDER=x.form.mma_sync_order,
        UNSCALE=x.form.unscale,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return y
