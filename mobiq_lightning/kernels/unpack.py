"""From packed words to an operand of the tensor cores, inside a Triton kernel.

Codes are masked out of a word and used as they are: an integer below 256, taken as the bits of a bfloat16 or float16, is a
subnormal number proportional to it. README.md in this folder derives this and names the rules for what is written here.

Every leaf of these expressions must be a load, a constant or an elementwise operation, masks included: one kernel argument
among them, and Triton moves the unpacked weights through shared memory.

Comments give the shape of a tile. r, t, h, c, j and p are the indices of the bit layout in `layout`: row within 8, pair of
columns within 8, upper or lower 8 rows, upper or lower 64 columns, block of 8 columns, column of a pair.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _operand(
    pairs,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CODES_ARE_SUBNORMAL: tl.constexpr,
    MMA_SYNC_ORDER: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Words that hold a 16-bit code in each half, as an operand [BN, BK] of type DTYPE."""
    if CODES_ARE_SUBNORMAL:
        even = pairs.to(tl.int16).to(DTYPE, bitcast=True)
        odd = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        even = (pairs & 0xFFFF).to(tl.float32).to(DTYPE)
        odd = ((pairs >> 16) & 0xFFFF).to(tl.float32).to(DTYPE)
    both = tl.join(even, odd)
    if MMA_SYNC_ORDER:  # eight columns of two neighbouring j in one thread
        both = both.reshape(BN // 16, 8, 4, 2, BK // 16, 2, 2)  # [BN / 16, r, t, h, (c, j / 2), j % 2, p]
        operand = tl.permute(both, 0, 3, 1, 4, 2, 5, 6).reshape(BN, BK)
    else:
        both = both.reshape(BN // 16, 8, 4, 2, BK // 8, 2)  # [BN / 16, r, t, h, (c, j), p]
        operand = tl.permute(both, 0, 3, 1, 4, 2, 5).reshape(BN, BK)
    return operand


@triton.jit
def _join4(a0, a1, a2, a3):
    """Four tiles along two new axes of two, whose joint index is that of the arguments."""
    return tl.join(tl.join(a0, a2), tl.join(a1, a3))


@triton.jit
def _join8(a0, a1, a2, a3, a4, a5, a6, a7):
    """Eight tiles along three new axes of two, whose joint index is that of the arguments."""
    return tl.join(
        tl.join(tl.join(a0, a4), tl.join(a2, a6)),
        tl.join(tl.join(a1, a5), tl.join(a3, a7)),
    )


@triton.jit
def _words_of(words, PIECE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The words of one step of a tile: all of them, or those of one half of the columns."""
    words = words.reshape(BN // 16, 8, 4, 2, 2)  # [BN / 16, r, t, h, c]
    if BK == 128:
        piece = words
    else:
        first, second = tl.split(words)  # [BN / 16, r, t, h] each
        piece = first if (PIECE * BK) // 64 == 0 else second
    return piece


@triton.jit
def unpack_one(
    words,
    PIECE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ONLY_UPPER_BIT: tl.constexpr,
    CODES_ARE_SUBNORMAL: tl.constexpr,
    MMA_SYNC_ORDER: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The 2-bit codes of one unit, each times ``4 ** (column / 8 % 4)`` because it stays where it is in its word.

    Args:
        words: [BN * 8] words of one tile.
        PIECE: Which step of the tile is unpacked, counted from 0.
        BN: Rows.
        BK: Columns of a step: 32, 64 or 128.
        ONLY_UPPER_BIT: Whether the lower bit of each code is dropped.
        CODES_ARE_SUBNORMAL: Whether codes are used as subnormal floating-point numbers instead of being converted.
        MMA_SYNC_ORDER: Whether columns are in the order that ``mma.sync`` wants, instead of that of ``wgmma``.
        DTYPE: dtype of the operand.

    Returns:
        [BN, BK] of type DTYPE.
    """
    w = _words_of(words, PIECE, BN, BK)
    u = w >> 8
    KEPT: tl.constexpr = 2 if ONLY_UPPER_BIT else 3
    M0: tl.constexpr = KEPT * 0x00010001
    M1: tl.constexpr = KEPT * 0x00040004
    M2: tl.constexpr = KEPT * 0x00100010
    M3: tl.constexpr = KEPT * 0x00400040
    if BK == 32:
        if PIECE % 2 == 0:
            pairs = _join4(w & M0, w & M1, w & M2, w & M3)
        else:
            pairs = _join4(u & M0, u & M1, u & M2, u & M3)
    else:
        pairs = _join8(w & M0, w & M1, w & M2, w & M3, u & M0, u & M1, u & M2, u & M3)
    return _operand(pairs, BN, BK, CODES_ARE_SUBNORMAL, MMA_SYNC_ORDER, DTYPE)


@triton.jit
def unpack_two(
    words,
    next_words,
    PIECE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CODES_ARE_SUBNORMAL: tl.constexpr,
    MMA_SYNC_ORDER: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The 4-bit codes that two units make together, each times ``16 ** (column / 16 % 2)``.

    Args:
        words: [BN * 8] words of one tile of the first unit, which holds the upper two bits.
        next_words: [BN * 8] words of the same tile of the unit after it.
        PIECE: Which step of the tile is unpacked, counted from 0.
        BN: Rows.
        BK: Columns of a step: 32, 64 or 128.
        CODES_ARE_SUBNORMAL: Whether codes are used as subnormal floating-point numbers instead of being converted.
        MMA_SYNC_ORDER: Whether columns are in the order that ``mma.sync`` wants, instead of that of ``wgmma``.
        DTYPE: dtype of the operand.

    Returns:
        [BN, BK] of type DTYPE.
    """
    a = _words_of(words, PIECE, BN, BK)
    b = _words_of(next_words, PIECE, BN, BK)
    A0: tl.constexpr = 0x000C000C
    A1: tl.constexpr = 0x00C000C0
    B0: tl.constexpr = 0x00030003
    B1: tl.constexpr = 0x00300030
    if BK == 32:
        if PIECE % 2 == 0:
            pairs = _join4(
                ((a << 2) & A0) | (b & B0),
                (a & A0) | ((b >> 2) & B0),
                ((a << 2) & A1) | (b & B1),
                (a & A1) | ((b >> 2) & B1),
            )
        else:
            pairs = _join4(
                ((a >> 6) & A0) | ((b >> 8) & B0),
                ((a >> 8) & A0) | ((b >> 10) & B0),
                ((a >> 6) & A1) | ((b >> 8) & B1),
                ((a >> 8) & A1) | ((b >> 10) & B1),
            )
    else:
        pairs = _join8(
            ((a << 2) & A0) | (b & B0),
            (a & A0) | ((b >> 2) & B0),
            ((a << 2) & A1) | (b & B1),
            (a & A1) | ((b >> 2) & B1),
            ((a >> 6) & A0) | ((b >> 8) & B0),
            ((a >> 8) & A0) | ((b >> 10) & B0),
            ((a >> 6) & A1) | ((b >> 8) & B1),
            ((a >> 8) & A1) | ((b >> 10) & B1),
        )
    return _operand(pairs, BN, BK, CODES_ARE_SUBNORMAL, MMA_SYNC_ORDER, DTYPE)


@triton.jit
def scale_of(meta):
    """The float32 scale that a word of `KernelWeights.meta` holds in its lower half."""
    return (meta << 16).to(tl.float32, bitcast=True)


@triton.jit
def bias_of(meta):
    """The float32 bias that a word of `KernelWeights.meta` holds in its upper half."""
    return (meta & -65536).to(tl.float32, bitcast=True)
