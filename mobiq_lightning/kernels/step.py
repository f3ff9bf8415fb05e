"""The product with one tile of weights inside a Triton kernel, and the order in which a pass visits tiles.

A *pass* goes through tiles of columns and multiplies them with one unit of the weights, or with two at once. `decode` and
`grouped` are made of such passes; README.md in this folder says why they are three.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mobiq_lightning.kernels.layout import TILE_COLUMNS
from mobiq_lightning.kernels.unpack import bias_of, scale_of, unpack_one, unpack_two

_TILE = tl.constexpr(TILE_COLUMNS)
# What a pass reads: the values of PASS.
ONE_UNIT = tl.constexpr(0)
UPPER_BIT = tl.constexpr(1)
TWO_UNITS = tl.constexpr(2)


@triton.jit
def next_tile(t, unit, next_unit, first, end, BT: tl.constexpr):
    """The position of the next iteration of a pass, which goes through all tiles of a unit before it takes the next unit.

    One loop over tiles and units instead of two keeps the software pipeline filled when a unit ends.

    Args:
        t: Tile of this iteration.
        unit: Unit of this iteration, or any value that changes once all tiles are done.
        next_unit: The value that follows `unit`.
        first: First tile.
        end: The tile after the last one.
        BT: Tiles per iteration.

    Returns:
        Tile and unit of the next iteration.
    """
    t += BT
    is_over = t >= end
    return tl.where(is_over, first, t), tl.where(is_over, next_unit, unit)


@triton.jit
def centre_of(bits):
    """The middle of a cell, beside its code: ``2**-(bits + 1) - 1/2`` is added to ``code / 2**bits``, in units of the scale.

    Args:
        bits: Depth of each token, integers of any shape.
    """
    return tl.exp2(-(bits + 1).to(tl.float32)) - 0.5


@triton.jit
def multiply_tile(
    acc,
    words,
    next_words,
    x,
    sums,
    meta,
    reads,
    centre,
    m,
    n,
    t,
    unit,
    M,
    T,
    N,
    PASS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CODES_ARE_SUBNORMAL: tl.constexpr,
    MMA_SYNC_ORDER: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Adds the product of BM tokens with BN rows of one tile of weights, a step of BK columns after the other.

    Args:
        acc: [BN, BM] float32 sums.
        words: [BN * 8] words of the tile in the unit.
        next_words: [BN * 8] words of the tile in the unit after it; only used if PASS is TWO_UNITS.
        x: (M, T * 128) tokens prepared for PASS.
        sums: (T * 128 / BK, M) float32 sums of the tokens over each step of columns.
        meta: (T * 128 / BK, N) int32 words of scale and bias, see `KernelWeights`.
        reads: [BM] whether each token reads the unit; one that does not adds nothing.
        centre: [BM], or one number for all tokens: what `centre_of` gives for their depths.
        m: [BM] numbers of the tokens.
        n: [BN] numbers of the rows.
        t: Number of the tile.
        unit: Number of the unit, or of the first of two.
        M: All tokens.
        T: All tiles.
        N: All rows.
        PASS: What is read: ONE_UNIT, the UPPER_BIT of each code of a unit, or TWO_UNITS at once.
        BN: Rows.
        BK: Columns that are multiplied before a scale is applied: 32, 64 or 128.
        CODES_ARE_SUBNORMAL: Whether codes are used as subnormal floating-point numbers instead of being converted.
        MMA_SYNC_ORDER: Whether columns are in the order that ``mma.sync`` wants, instead of that of ``wgmma``.
        DTYPE: dtype of tokens and unpacked weights.

    Returns:
        [BN, BM] float32 sums.
    """
    PIECES: tl.constexpr = _TILE // BK
    for piece in tl.static_range(PIECES):
        step = t * PIECES + piece
        k = step * BK + tl.arange(0, BK)  # [BK]
        tokens = tl.load(x + m[:, None] * (T * _TILE) + k[None, :], mask=reads[:, None], other=0.0)  # [BM, BK]
        token_sums = tl.load(sums + step * M + m, mask=reads, other=0.0)  # [BM]
        scale_and_bias = tl.load(meta + step * N + n)  # [BN]
        acc = _multiply_step(
            acc, words, next_words, tokens, token_sums, scale_and_bias, centre, unit,
            PIECE=piece, PASS=PASS, BN=BN, BK=BK,
            CODES_ARE_SUBNORMAL=CODES_ARE_SUBNORMAL, MMA_SYNC_ORDER=MMA_SYNC_ORDER, DTYPE=DTYPE,
        )  # fmt: skip
    return acc


@triton.jit
def _multiply_step(
    acc,
    words,
    next_words,
    tokens,
    token_sums,
    scale_and_bias,
    centre,
    unit,
    PIECE: tl.constexpr,
    PASS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CODES_ARE_SUBNORMAL: tl.constexpr,
    MMA_SYNC_ORDER: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Adds the product of step PIECE of a tile: tokens [BM, BK], their sums [BM], words of scale and bias [BN]."""
    if PASS == TWO_UNITS:
        w = unpack_two(
            words, next_words, PIECE=PIECE, BN=BN, BK=BK,
            CODES_ARE_SUBNORMAL=CODES_ARE_SUBNORMAL, MMA_SYNC_ORDER=MMA_SYNC_ORDER, DTYPE=DTYPE,
        )  # [BN, BK]  # fmt: skip
        worth = tl.where(unit == 0, 0.0625, 0.00390625)  # 4 ** -(unit + 2)
        inverse = 16.0
    else:
        w = unpack_one(
            words, PIECE=PIECE, BN=BN, BK=BK, ONLY_UPPER_BIT=PASS == UPPER_BIT,
            CODES_ARE_SUBNORMAL=CODES_ARE_SUBNORMAL, MMA_SYNC_ORDER=MMA_SYNC_ORDER, DTYPE=DTYPE,
        )  # [BN, BK]  # fmt: skip
        # 4 ** -(unit + 1)
        worth = tl.where(unit == 0, 0.25, tl.where(unit == 1, 0.0625, tl.where(unit == 2, 0.015625, 0.00390625)))
        inverse = 4.0
    # The bias and the middle of the cell do not depend on the code, so they are added once, in the pass over unit 0. The
    # middle enters the sum before it is multiplied by the worth of unit 0, hence the inverse.
    is_first = unit == 0
    start = tl.where(is_first, token_sums * centre * inverse, 0.0)  # [BM]
    dot = tl.dot(w, tl.trans(tokens), tl.broadcast_to(start[None, :], acc.shape), input_precision="ieee")  # [BN, BM]
    acc += (scale_of(scale_and_bias) * worth)[:, None] * dot
    acc += tl.where(is_first, bias_of(scale_and_bias), 0.0)[:, None] * token_sums[None, :]
    return acc
