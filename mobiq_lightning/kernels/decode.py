"""Product of a few tokens (1 to 64) with a sliced weight, each token at its own depth; every unit is read only if a token
needs it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobiq_lightning.kernels.layout import TILE_COLUMNS, KernelWeights
from mobiq_lightning.kernels.prepare import Prepared
from mobiq_lightning.kernels.step import centre_of, multiply_step
from mobiq_lightning.kernels.tuning import DecodeConfig

_TILE = tl.constexpr(TILE_COLUMNS)


@triton.jit
def _pass(
    acc,
    x,
    sums,
    units,
    meta,
    on,
    centre,
    rm,
    rw,
    rn,
    t,
    unit,
    M,
    T,
    R,
    KIND: tl.constexpr,
    TPI: tl.constexpr,
    NB: tl.constexpr,
    STEP: tl.constexpr,
    SUB: tl.constexpr,
    KW4: tl.constexpr,
    DT: tl.constexpr,
):
    """Adds TPI tiles of one unit, or of two."""
    PIECES: tl.constexpr = _TILE // STEP
    stride = T * R * 8
    for i in tl.static_range(TPI):
        at = units + unit * stride + (t + i) * R * 8 + rw
        a = tl.load(at, eviction_policy="evict_first")
        b = a
        if KIND == 2:
            b = tl.load(at + stride, eviction_policy="evict_first")
        for piece in tl.static_range(PIECES):
            step = (t + i) * PIECES + piece
            columns = step * STEP + tl.arange(0, STEP)
            xv = tl.load(x + rm[:, None] * (T * _TILE) + columns[None, :], mask=on[:, None], other=0.0)
            xg = tl.load(sums + step * M + rm, mask=on, other=0.0)
            mv = tl.load(meta + step * R + rn)
            acc = multiply_step(acc, a, b, xv, xg, centre, mv, unit, piece, KIND, NB, STEP, SUB, KW4, DT)
    return acc


@triton.jit(do_not_specialize=["M", "T", "TS", "SPLIT", "block0"])
def decode_kernel(
    x_one,
    x_two,
    sums,
    bits,
    info,
    units,
    meta,
    part,
    counters,
    y,
    M,
    R,
    NY,
    T,
    TS,
    SPLIT,
    block0,
    MULTI: tl.constexpr,
    MR: tl.constexpr,
    SC: tl.constexpr,
    BN: tl.constexpr,
    MP: tl.constexpr,
    TPI: tl.constexpr,
    NS: tl.constexpr,
    STEP: tl.constexpr,
    SUB: tl.constexpr,
    BACK: tl.constexpr,
    KW4: tl.constexpr,
    PAIRS: tl.constexpr,
    ODD: tl.constexpr,
):
    """One program: BN rows, all tokens, TS tiles of columns (split K).

    Args:
        x_one, x_two: (M, T * 128) prepared tokens, for one unit and for two at once.
        sums: (T * 128 / STEP, M) sums of the tokens over each step.
        bits: (M,) depth of each token.
        info: (3,) lowest and highest of them, and a mask of units of which a token reads the upper bit alone.
        units, meta: Of `KernelWeights`; R rows, T tiles.
        part: (SPLIT, M, NY) float32 partial sums, if MULTI.
        counters: Of `KernelWeights`.
        y: (M, NY), columns from 0 for the first row of block `block0`.
        TS: Tiles of each program, a multiple of TPI.
        MULTI: Whether SPLIT is more than one.
        MR, SC: Tokens and partial sums that the last program of a row block adds at once.
        MP: Columns of the tensor core's product, at least M.
        TPI: Tiles per iteration.
        NS: Stages of the software pipeline.
        SUB, BACK, KW4: As the tokens were prepared; sums are multiplied by BACK at the end.
        PAIRS: Whether units that all tokens need are read two at a time.
        ODD: Whether a token may read the upper bit of a unit alone.
    """
    DT: tl.constexpr = x_one.dtype.element_ty
    NB: tl.constexpr = BN // 16
    pn = tl.program_id(0)
    pk = tl.program_id(1)
    rm = tl.arange(0, MP)
    rw = tl.arange(0, BN * 8)
    ry = pn * BN + tl.arange(0, BN)
    rn = block0 * 128 + ry
    t0 = pk * TS
    t1 = tl.minimum(t0 + TS, T)
    base = units + (block0 * 128 + pn * BN) * 8
    live = rm < M
    depth = tl.load(bits + rm, mask=live, other=0)
    centre = centre_of(depth)
    # Reduced over tokens here, they would make every loop bound a per-thread value to the assembler.
    lowest = tl.load(info)
    highest = tl.load(info + 1)
    iterations = tl.maximum(t1 - t0, 0) // TPI
    acc = tl.zeros([BN, MP], dtype=tl.float32)

    shared = 0  # units that the passes over two units have done
    if PAIRS:
        n_pairs = lowest // 4
        shared = 2 * n_pairs
        t = t0
        unit = 0
        for _ in tl.range(0, iterations * n_pairs, num_stages=NS):
            acc = _pass(
                acc, x_two, sums, base, meta, live, centre, rm, rw, rn, t, unit, M, T, R,
                2, TPI, NB, STEP, SUB, KW4, DT,
            )  # fmt: skip
            t += TPI
            wrapped = t >= t1
            t = tl.where(wrapped, t0, t)
            unit = tl.where(wrapped, unit + 2, unit)

    t = t0
    unit = shared
    for _ in tl.range(0, iterations * (highest // 2 - shared), num_stages=NS):
        on = depth >= 2 * unit + 2
        acc = _pass(
            acc, x_one, sums, base, meta, on, centre, rm, rw, rn, t, unit, M, T, R,
            0, TPI, NB, STEP, SUB, KW4, DT,
        )  # fmt: skip
        t += TPI
        wrapped = t >= t1
        t = tl.where(wrapped, t0, t)
        unit = tl.where(wrapped, unit + 1, unit)

    if ODD:
        left = tl.load(info + 2)
        n_odd = (left & 1) + (left >> 1 & 1) + (left >> 2 & 1) + (left >> 3 & 1)
        t = t0
        for _ in tl.range(0, iterations * n_odd, num_stages=NS):
            unit = tl.where((left & 1) != 0, 0, tl.where((left & 2) != 0, 1, tl.where((left & 4) != 0, 2, 3)))
            on = depth == 2 * unit + 1
            acc = _pass(
                acc, x_one, sums, base, meta, on, centre, rm, rw, rn, t, unit, M, T, R,
                1, TPI, NB, STEP, SUB, KW4, DT,
            )  # fmt: skip
            t += TPI
            wrapped = t >= t1
            t = tl.where(wrapped, t0, t)
            left = tl.where(wrapped, left & (left - 1), left)

    acc = acc * BACK
    if not MULTI:
        tl.store(y + rm[None, :] * NY + ry[:, None], acc.to(y.dtype.element_ty), mask=live[None, :])
    else:
        tl.store(part + (pk * M + rm[None, :]) * NY + ry[:, None], acc, mask=live[None, :])
        tl.debug_barrier()  # the release below must come after the stores of all threads
        counter = counters + block0 * 8 + pn * NB
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:  # the last program adds, always in the same order
            tl.debug_barrier()
            rr = tl.arange(0, MR)
            rs = tl.arange(0, SC)
            at = part + rr[None, :, None] * NY + ry[None, None, :]
            total = tl.zeros([MR, BN], dtype=tl.float32)
            for s in range(0, SPLIT, SC):
                split = s + rs[:, None, None]
                ok = (rr[None, :, None] < M) & (split < SPLIT)
                total += tl.sum(tl.load(at + split * M * NY, mask=ok, other=0.0, cache_modifier=".cg"), 0)
            tl.store(y + rr[:, None] * NY + ry[None, :], total.to(y.dtype.element_ty), mask=rr[:, None] < M)
            tl.atomic_xchg(counter, 0)  # as the next launch, or the next replay of a graph, must find it


def decode(
    x: Prepared,
    weights: KernelWeights,
    config: DecodeConfig,
    n_processors: int,
    block0: int = 0,
    rows: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Tokens times weights.

    Args:
        x: 1 to 64 tokens, prepared for this product.
        weights: In the kernels' order, on the same device.
        config: How the work is divided.
        n_processors: Streaming multiprocessors of the device.
        block0: First block of 128 padded rows that is computed.
        rows: Padded rows from there on; by default all.
        dtype: Of the result; by default that of the tokens.

    Returns:
        (M, rows).
    """
    rows = weights.rows - block0 * 128 if rows is None else rows
    tokens, tiles = x.bits.shape[0], weights.tiles
    blocks, per_program = rows // config.block_rows, config.tiles_per_iteration
    wanted = -(-config.programs_per_processor * n_processors // blocks)
    split = max(1, min(tiles // per_program, wanted))
    share = -(-tiles // (split * per_program)) * per_program
    split = -(-tiles // share)
    y = torch.empty(tokens, rows, dtype=dtype or x.dtype, device=x.bits.device)
    part = y if split == 1 else torch.empty(split, tokens, rows, dtype=torch.float32, device=y.device)
    columns = decode_columns(tokens)
    at_once = triton.next_power_of_2(tokens) if columns == 8 else columns
    decode_kernel[(blocks, split)](
        x.one,
        x.two,
        x.sums,
        x.bits,
        x.info,
        weights.units,
        weights.meta,
        part,
        weights.counters,
        y,
        tokens,
        weights.rows,
        rows,
        tiles,
        share,
        split,
        block0,
        MULTI=int(split > 1),
        MR=at_once,
        SC=max(1, 16 // at_once),
        BN=config.block_rows,
        MP=columns,
        TPI=per_program,
        NS=config.stages,
        STEP=weights.step,
        SUB=int(x.form.sub),
        BACK=x.form.back,
        KW4=int(x.form.kw4),
        PAIRS=int(sum(weights.slice_bits) >= 4),
        ODD=int(any(depth % 2 for depth in weights.depths)),
        num_warps=decode_warps(columns),
        enable_fp_fusion=True,
    )
    return y


def decode_columns(tokens: int) -> int:
    """Columns of the tensor core's product for so many tokens: 8, 16, 32 or 64."""
    return 8 if tokens <= 8 else max(16, triton.next_power_of_2(tokens))


def decode_warps(columns: int) -> int:
    """Warps of a program. Two keep Triton off `wgmma`, so that 8 columns need the same order on every device; with 64
    columns, four would have to spill registers.
    """
    return {8: 2, 16: 4, 32: 4, 64: 8}[columns]
