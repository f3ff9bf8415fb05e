"""Product of more tokens than `decode` takes: tokens sorted by depth, in tiles of one depth each, units read in pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobiq_lightning.kernels.layout import TILE_COLUMNS, KernelWeights
from mobiq_lightning.kernels.prepare import Prepared
from mobiq_lightning.kernels.step import centre_of, multiply_step

_TILE = tl.constexpr(TILE_COLUMNS)
_DEEPEST = 8
BLOCK_ROWS, BLOCK_TOKENS, WARPS = 128, 64, 8
"""Of a program; tiles of 128 tokens spill registers."""
WEIGHT_BLOCKS_TOGETHER = 8
"""Row blocks that all tiles of tokens go through before the next ones, so that their units stay in the cache."""


@dataclass(frozen=True)
class Plan:
    """Which tokens a tile takes. Made on the device, with shapes that depend on the number of tokens alone.

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
        n_depths: How many different ones there may be.
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
    R,
    NY,
    T,
    block0,
    BN: tl.constexpr,
    BM: tl.constexpr,
    NS: tl.constexpr,
    TOGETHER: tl.constexpr,
    STEP: tl.constexpr,
    SUB: tl.constexpr,
    BACK: tl.constexpr,
    KW4: tl.constexpr,
    ODD: tl.constexpr,
):
    """One program: BN rows, one tile of BM tokens. Arguments as in `decode_kernel` and `Plan`."""
    DT: tl.constexpr = x_one.dtype.element_ty
    NB: tl.constexpr = BN // 16
    PIECES: tl.constexpr = _TILE // STEP
    row_blocks = NY // BN
    tiles = tl.num_programs(0) // row_blocks
    pid = tl.program_id(0)
    width = TOGETHER * tiles
    first = (pid // width) * TOGETHER
    together = tl.minimum(row_blocks - first, TOGETHER)
    pn = first + (pid % width) % together
    pt = (pid % width) // together
    depth = tl.load(tile_depth + pt)
    if depth != 0:
        rm = tl.arange(0, BM)
        rw = tl.arange(0, BN * 8)
        ry = pn * BN + tl.arange(0, BN)
        rn = block0 * 128 + ry
        live = rm < tl.load(tile_count + pt)
        token = tl.load(order + tl.load(tile_start + pt) + rm, mask=live, other=0).to(tl.int64)
        base = units + (block0 * 128 + pn * BN) * 8
        stride = T * R * 8
        centre = centre_of(depth)
        whole = depth // 2
        acc = tl.zeros([BN, BM], dtype=tl.float32)
        columns = tl.arange(0, STEP)

        t = 0
        unit = 0
        for _ in tl.range(0, T * ((whole + 1) // 2), num_stages=NS):
            at = base + unit * stride + t * R * 8 + rw
            a = tl.load(at)
            # A unit that these tokens do not need is neither read nor counted.
            b = tl.load(at + stride, mask=rw >= tl.where(unit + 1 < whole, 0, BN * 8), other=0)
            for piece in tl.static_range(PIECES):
                step = t * PIECES + piece
                where = token[:, None] * (T * _TILE) + (step * STEP + columns)[None, :]
                xv = tl.load(x_two + where, mask=live[:, None], other=0.0)
                xg = tl.load(sums + step * M + token, mask=live, other=0.0)
                mv = tl.load(meta + step * R + rn)
                acc = multiply_step(acc, a, b, xv, xg, centre, mv, unit, piece, 2, NB, STEP, SUB, KW4, DT)
            t += 1
            wrapped = t == T
            t = tl.where(wrapped, 0, t)
            unit = tl.where(wrapped, unit + 2, unit)

        if ODD:
            for t in tl.range(0, T * (depth % 2), num_stages=NS):
                a = tl.load(base + whole * stride + t * R * 8 + rw)
                for piece in tl.static_range(PIECES):
                    step = t * PIECES + piece
                    where = token[:, None] * (T * _TILE) + (step * STEP + columns)[None, :]
                    xv = tl.load(x_one + where, mask=live[:, None], other=0.0)
                    xg = tl.load(sums + step * M + token, mask=live, other=0.0)
                    mv = tl.load(meta + step * R + rn)
                    acc = multiply_step(acc, a, a, xv, xg, centre, mv, whole, piece, 1, NB, STEP, SUB, KW4, DT)

        acc = acc * BACK
        tl.store(y + token[None, :] * NY + ry[:, None], acc.to(y.dtype.element_ty), mask=live[None, :])


def grouped(
    x: Prepared,
    weights: KernelWeights,
    block0: int = 0,
    rows: int | None = None,
    dtype: torch.dtype | None = None,
    block: int = BLOCK_TOKENS,
) -> Tensor:
    """Tokens times weights.

    Args:
        x: Any number of tokens, prepared for this product.
        weights: In the kernels' order, on the same device.
        block0: First block of 128 padded rows that is computed.
        rows: Padded rows from there on; by default all.
        dtype: Of the result; by default that of the tokens.
        block: Tokens of a tile.

    Returns:
        (M, rows).
    """
    rows = weights.rows - block0 * 128 if rows is None else rows
    tokens = x.bits.shape[0]
    y = torch.empty(tokens, rows, dtype=dtype or x.dtype, device=x.bits.device)
    plan = plan_tiles(x.bits, len(weights.depths), block)
    grouped_kernel[(rows // BLOCK_ROWS * len(plan.depth),)](
        x.one,
        x.two,
        x.sums,
        plan.order,
        plan.depth,
        plan.start,
        plan.count,
        weights.units,
        weights.meta,
        y,
        tokens,
        weights.rows,
        rows,
        weights.tiles,
        block0,
        BN=BLOCK_ROWS,
        BM=block,
        NS=3,
        TOGETHER=WEIGHT_BLOCKS_TOGETHER,
        STEP=weights.step,
        SUB=int(x.form.sub),
        BACK=x.form.back,
        KW4=int(x.form.kw4),
        ODD=int(any(depth % 2 for depth in weights.depths)),
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return y
