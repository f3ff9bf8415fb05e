"""Product of a few tokens (1 to 64) with a sliced weight, each token at its own depth; every unit is read only if a token
needs it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobiq_lightning.kernels.form import Prepared
from mobiq_lightning.kernels.layout import ROW_BLOCK, TILE_ROWS, WORDS_PER_ROW, KernelWeights
from mobiq_lightning.kernels.step import ONE_UNIT, TWO_UNITS, UPPER_BIT, centre_of, multiply_tile, next_tile
from mobiq_lightning.kernels.tuning import DecodeConfig

_TILE_ROWS = tl.constexpr(TILE_ROWS)
_ROW_BLOCK = tl.constexpr(ROW_BLOCK)
_WORDS = tl.constexpr(WORDS_PER_ROW)


@triton.jit
def _add_pass(
    acc,
    x,
    sums,
    units,
    meta,
    depth,
    centre,
    m,
    word,
    n,
    first_tile,
    end_tile,
    first,
    n_rounds,
    M,
    T,
    N,
    PASS: tl.constexpr,
    STAGES: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CODES_ARE_SUBNORMAL: tl.constexpr,
    MMA_SYNC_ORDER: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Adds the products of all units that are read in one way: together, one by one, or of the upper bit alone.

    Arguments that `decode_kernel` does not have: `x` are the tokens prepared for PASS, `units` begins at the first row of
    the program, `m`, `word` and `n` are its tokens, words of a tile and rows of the weights. `first` is the first unit, or,
    for UPPER_BIT, a mask of the units; `n_rounds` is how many times the pass goes through the tiles.
    """
    unit_stride = T * N * _WORDS
    iterations = tl.maximum(end_tile - first_tile, 0) // BT
    t = first_tile
    left = first
    for _ in tl.range(0, iterations * n_rounds, num_stages=STAGES):
        if PASS == TWO_UNITS:
            unit = left
            following = left + 2
            reads = m < M  # [BM]
        elif PASS == ONE_UNIT:
            unit = left
            following = left + 1
            reads = depth >= 2 * unit + 2  # [BM]
        else:
            unit = tl.where((left & 1) != 0, 0, tl.where((left & 2) != 0, 1, tl.where((left & 4) != 0, 2, 3)))
            following = left & (left - 1)
            reads = depth == 2 * unit + 1  # [BM]
        for i in tl.static_range(BT):
            at = units + unit * unit_stride + (t + i) * N * _WORDS + word  # [BN * 8]
            words = tl.load(at, eviction_policy="evict_first")  # [BN * 8]
            next_words = words
            if PASS == TWO_UNITS:
                next_words = tl.load(at + unit_stride, eviction_policy="evict_first")  # [BN * 8]
            acc = multiply_tile(
                acc, words, next_words, x, sums, meta, reads, centre, m, n, t + i, unit, M, T, N,
                PASS=PASS, BN=BN, BK=BK,
                CODES_ARE_SUBNORMAL=CODES_ARE_SUBNORMAL, MMA_SYNC_ORDER=MMA_SYNC_ORDER, DTYPE=DTYPE,
            )  # fmt: skip
        t, left = next_tile(t, left, following, first_tile, end_tile, BT)
    return acc


@triton.jit
def _add_partial_sums(
    part, counter, y, n_out, M, N_OUT, n_splits, BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr
):
    """Counts this program as done; the last one of a block of rows adds the partial sums of all, always in the same order.

    Args:
        part: (n_splits, M, N_OUT) float32 partial sums, those of this program stored.
        counter: How many programs of this block of rows are done; left at zero, as the next launch, or the next replay of
            a graph, must find it.
        y: (M, N_OUT) result.
        n_out: [BN] columns of `y` of this block of rows.
        M, N_OUT: Sizes of `y`.
        n_splits: Programs that share a block of rows.
        BN: Rows of the block.
        BM: Tokens that are added at once, a power of two of at least M.
        BP: Partial sums that are added at once.
    """
    tl.debug_barrier()  # the release below must come after the stores of all threads
    if tl.atomic_add(counter, 1, sem="acq_rel") == n_splits - 1:
        tl.debug_barrier()
        m = tl.arange(0, BM)  # [BM]
        p = tl.arange(0, BP)  # [BP]
        at = part + m[None, :, None] * N_OUT + n_out[None, None, :]  # [1, BM, BN]
        total = tl.zeros([BM, BN], dtype=tl.float32)
        for first in range(0, n_splits, BP):
            split = first + p[:, None, None]  # [BP, 1, 1]
            is_there = (m[None, :, None] < M) & (split < n_splits)  # [BP, BM, 1]
            parts = tl.load(at + split * M * N_OUT, mask=is_there, other=0.0, cache_modifier=".cg")  # [BP, BM, BN]
            total += tl.sum(parts, 0)
        tl.store(y + m[:, None] * N_OUT + n_out[None, :], total.to(y.dtype.element_ty), mask=m[:, None] < M)
        tl.atomic_xchg(counter, 0)


@triton.jit(do_not_specialize=["M", "T", "tiles_per_program", "n_splits", "block0"])
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
    N,
    N_OUT,
    T,
    tiles_per_program,
    n_splits,
    block0,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BM_SUM: tl.constexpr,
    BP_SUM: tl.constexpr,
    STAGES: tl.constexpr,
    IS_MULTI_SPLIT: tl.constexpr,
    USE_UNIT_PAIRS: tl.constexpr,
    HAS_ODD_DEPTHS: tl.constexpr,
    CODES_ARE_SUBNORMAL: tl.constexpr,
    MMA_SYNC_ORDER: tl.constexpr,
    UNSCALE: tl.constexpr,
):
    """Multiplies all tokens with BN rows of the weights, over the columns of one split (split K).

    Args:
        x_one: (M, T * 128) tokens prepared for one unit at a time.
        x_two: (M, T * 128) tokens prepared for two units at once.
        sums: (T * 128 / BK, M) float32 sums of the tokens over each step of columns.
        bits: (M,) int32 depth of each token.
        info: (3,) int32: lowest and highest depth, and a mask of units of which a token reads the upper bit alone.
        units: (U, T, N * 8) int32 words, see `KernelWeights`.
        meta: (T * 128 / BK, N) int32 words of scale and bias, see `KernelWeights`.
        part: (n_splits, M, N_OUT) float32 partial sums; only used if IS_MULTI_SPLIT.
        counters: (N / 16,) int32 zeros, one counter used for each block of rows.
        y: (M, N_OUT) result; its column 0 is the first row of block `block0`.
        M: Tokens.
        N: Padded rows of the weights.
        N_OUT: Padded rows that are computed.
        T: Tiles of 128 columns.
        tiles_per_program: Tiles of one split, a multiple of BT.
        n_splits: Programs that share the columns of a block of rows.
        block0: First block of 128 rows that is computed.
        BN: Rows of a program.
        BM: Columns of the tensor core's product, at least M.
        BT: Tiles per iteration.
        BK: Columns that are multiplied before a scale is applied: 32, 64 or 128.
        BM_SUM: Tokens of partial sums that are added at once, at least M.
        BP_SUM: Partial sums that are added at once.
        STAGES: Stages of the software pipeline.
        IS_MULTI_SPLIT: Whether `n_splits` is more than one.
        USE_UNIT_PAIRS: Whether units that all tokens read are read two at a time.
        HAS_ODD_DEPTHS: Whether a token may read the upper bit of a unit alone.
        CODES_ARE_SUBNORMAL: Whether codes are used as subnormal floating-point numbers instead of being converted.
        MMA_SYNC_ORDER: Whether tokens were prepared in the order that ``mma.sync`` wants, instead of that of ``wgmma``.
        UNSCALE: Factor of the sums that makes codes worth what they are.
    """
    DTYPE: tl.constexpr = x_one.dtype.element_ty
    pn = tl.program_id(0)
    pk = tl.program_id(1)
    m = tl.arange(0, BM)  # [BM]
    word = tl.arange(0, BN * _WORDS)  # [BN * 8]
    n_out = pn * BN + tl.arange(0, BN)  # [BN]
    n = block0 * _ROW_BLOCK + n_out  # [BN]
    first_tile = pk * tiles_per_program
    end_tile = tl.minimum(first_tile + tiles_per_program, T)
    base = units + (block0 * _ROW_BLOCK + pn * BN) * _WORDS
    is_token = m < M  # [BM]
    depth = tl.load(bits + m, mask=is_token, other=0)  # [BM]
    centre = centre_of(depth)  # [BM]
    # Reduced over tokens here, they would make every loop bound a per-thread value to the assembler.
    lowest = tl.load(info)
    highest = tl.load(info + 1)
    acc = tl.zeros([BN, BM], dtype=tl.float32)

    first_alone = 0  # the first unit that is read alone
    if USE_UNIT_PAIRS:
        n_pairs = lowest // 4
        first_alone = 2 * n_pairs
        acc = _add_pass(
            acc, x_two, sums, base, meta, depth, centre, m, word, n, first_tile, end_tile, 0, n_pairs, M, T, N,
            PASS=TWO_UNITS, STAGES=STAGES, BT=BT, BN=BN, BK=BK,
            CODES_ARE_SUBNORMAL=CODES_ARE_SUBNORMAL, MMA_SYNC_ORDER=MMA_SYNC_ORDER, DTYPE=DTYPE,
        )  # fmt: skip
    n_alone = highest // 2 - first_alone
    acc = _add_pass(
        acc, x_one, sums, base, meta, depth, centre, m, word, n, first_tile, end_tile, first_alone, n_alone, M, T, N,
        PASS=ONE_UNIT, STAGES=STAGES, BT=BT, BN=BN, BK=BK,
        CODES_ARE_SUBNORMAL=CODES_ARE_SUBNORMAL, MMA_SYNC_ORDER=MMA_SYNC_ORDER, DTYPE=DTYPE,
    )  # fmt: skip
    if HAS_ODD_DEPTHS:
        odd = tl.load(info + 2)  # a mask of units
        n_odd = (odd & 1) + (odd >> 1 & 1) + (odd >> 2 & 1) + (odd >> 3 & 1)
        acc = _add_pass(
            acc, x_one, sums, base, meta, depth, centre, m, word, n, first_tile, end_tile, odd, n_odd, M, T, N,
            PASS=UPPER_BIT, STAGES=STAGES, BT=BT, BN=BN, BK=BK,
            CODES_ARE_SUBNORMAL=CODES_ARE_SUBNORMAL, MMA_SYNC_ORDER=MMA_SYNC_ORDER, DTYPE=DTYPE,
        )  # fmt: skip

    acc = acc * UNSCALE
    if not IS_MULTI_SPLIT:
        at = y + m[None, :] * N_OUT + n_out[:, None]  # [BN, BM]
        tl.store(at, acc.to(y.dtype.element_ty), mask=is_token[None, :])
    else:
        tl.store(part + (pk * M + m[None, :]) * N_OUT + n_out[:, None], acc, mask=is_token[None, :])
        counter = counters + block0 * (_ROW_BLOCK // _TILE_ROWS) + pn * (BN // _TILE_ROWS)
        _add_partial_sums(part, counter, y, n_out, M, N_OUT, n_splits, BN, BM_SUM, BP_SUM)


def decode(
    x: Prepared,
    weights: KernelWeights,
    config: DecodeConfig,
    n_processors: int,
    block0: int = 0,
    rows: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiplies 1 to 64 tokens with a sliced weight, each at its own depth.

    Args:
        x: M tokens, prepared for this product.
        weights: Weights in the kernels' order, on the same device.
        config: How the work is divided among programs.
        n_processors: Streaming multiprocessors of the device.
        block0: First block of 128 padded rows that is computed.
        rows: Padded rows that are computed from there on; by default all.
        dtype: dtype of the result; by default that of the tokens.

    Returns:
        (M, rows).
    """
    rows = weights.rows - block0 * ROW_BLOCK if rows is None else rows
    tokens, tiles = x.bits.shape[0], weights.tiles
    blocks, per_iteration = rows // config.block_rows, config.tiles_per_iteration
    wanted = -(-config.programs_per_processor * n_processors // blocks)
    split = max(1, min(tiles // per_iteration, wanted))
    share = -(-tiles // (split * per_iteration)) * per_iteration
    split = -(-tiles // share)
    y = torch.empty(tokens, rows, dtype=dtype or x.dtype, device=x.bits.device)
    part = y if split == 1 else torch.empty(split, tokens, rows, dtype=torch.float32, device=y.device)
    columns = decode_columns(tokens)
    at_once = triton.next_power_of_2(tokens) if columns == 8 else columns
    decode_kernel[(blocks, split)](
        x_one=x.one,
        x_two=x.two,
        sums=x.sums,
        bits=x.bits,
        info=x.info,
        units=weights.units,
        meta=weights.meta,
        part=part,
        counters=weights.counters,
        y=y,
        M=tokens,
        N=weights.rows,
        N_OUT=rows,
        T=tiles,
        tiles_per_program=share,
        n_splits=split,
        block0=block0,
        BN=config.block_rows,
        BM=columns,
        BT=per_iteration,
        BK=weights.step,
        BM_SUM=at_once,
        BP_SUM=max(1, 16 // at_once),
        STAGES=config.stages,
        IS_MULTI_SPLIT=split > 1,
        USE_UNIT_PAIRS=sum(weights.slice_bits) >= 4,
        HAS_ODD_DEPTHS=any(depth % 2 for depth in weights.depths),
        CODES_ARE_SUBNORMAL=x.form.codes_are_subnormal,
        MMA_SYNC_ORDER=x.form.mma_sync_order,
        UNSCALE=x.form.unscale,
        num_warps=decode_warps(columns),
        enable_fp_fusion=True,
    )
    return y


def decode_columns(tokens: int) -> int:
    """Columns that the tensor core's product needs for some tokens.

    Args:
        tokens: 1 to 64.

    Returns:
        8, 16, 32 or 64.
    """
    return 8 if tokens <= 8 else max(16, triton.next_power_of_2(tokens))


def decode_warps(columns: int) -> int:
    """Warps of a program of `decode_kernel`.

    Args:
        columns: What `decode_columns` gives.
    """
    # Two keep Triton off `wgmma`, so that 8 columns need the same order on every device; with 64 columns, four would have
    # to spill registers.
    return {8: 2, 16: 4, 32: 4, 64: 8}[columns]
