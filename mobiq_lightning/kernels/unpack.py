"""From packed words to an operand of the tensor cores, inside a Triton kernel.

The bfloat16 whose bits are the integer v, 0 <= v < 256, has the value ``v * 2**-133``, and the float16 whose bits are v has
``v * 2**-24``: subnormal numbers are evenly spaced. So masking a word gives two operands at once, no conversion needed;
`prepare` scales the tokens so that products stay in range, and the kernels scale the sum back. This needs tensor cores
that keep subnormal numbers, as NVIDIA's do. ``SUB = 0`` converts the codes instead, for the interpreter.

Every leaf of these expressions must be a load, a constant or an elementwise operation, masks included: one kernel argument
among them, and Triton moves the unpacked weights through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _operand(pairs, NB: tl.constexpr, STEP: tl.constexpr, SUB: tl.constexpr, KW4: tl.constexpr, DT: tl.constexpr):
    """Pairs of 16-bit codes (nb r t h, column bits) as an operand (NB * 16, STEP) of type DT."""
    if SUB:
        even = pairs.to(tl.int16).to(DT, bitcast=True)
        odd = (pairs >> 16).to(tl.int16).to(DT, bitcast=True)
    else:
        even = (pairs & 0xFFFF).to(tl.float32).to(DT)
        odd = ((pairs >> 16) & 0xFFFF).to(tl.float32).to(DT)
    both = tl.join(even, odd)
    if KW4:  # the order that mma.sync wants: eight columns of two neighbouring j in one thread
        both = both.reshape(NB, 8, 4, 2, STEP // 16, 2, 2)  # nb r t h (c, j >> 1) (j & 1) p
        operand = tl.permute(both, 0, 3, 1, 4, 2, 5, 6).reshape(NB * 16, STEP)
    else:
        both = both.reshape(NB, 8, 4, 2, STEP // 8, 2)  # nb r t h (c, j) p
        operand = tl.permute(both, 0, 3, 1, 4, 2, 5).reshape(NB * 16, STEP)
    return operand


@triton.jit
def _join4(a0, a1, a2, a3):
    return tl.join(tl.join(a0, a2), tl.join(a1, a3))


@triton.jit
def _join8(a0, a1, a2, a3, a4, a5, a6, a7):
    return tl.join(
        tl.join(tl.join(a0, a4), tl.join(a2, a6)),
        tl.join(tl.join(a1, a5), tl.join(a3, a7)),
    )


@triton.jit
def _words(w, PIECE: tl.constexpr, NB: tl.constexpr, STEP: tl.constexpr):
    """The words of one piece of a tile: all of them, or those of one half of the columns."""
    w = w.reshape(NB, 8, 4, 2, 2)
    if STEP == 128:
        words = w
    else:
        first, second = tl.split(w)
        words = first if (PIECE * STEP) // 64 == 0 else second
    return words


@triton.jit
def unpack_one(
    w,
    PIECE: tl.constexpr,
    NB: tl.constexpr,
    STEP: tl.constexpr,
    HIGH: tl.constexpr,
    SUB: tl.constexpr,
    KW4: tl.constexpr,
    DT: tl.constexpr,
):
    """Codes of one unit, times ``4 ** (column / 8 % 4)``: the codes stay where they are in the word.

    Args:
        w: (NB * 128,) words of one tile.
        PIECE: Which step of the tile.
        NB: Blocks of 16 rows.
        STEP: Columns, 32, 64 or 128.
        HIGH: Whether only the upper bit of each code counts.
        SUB: Whether codes are taken as subnormal numbers.
        KW4: Order of the columns, see `prepare`.
        DT: Type of the operand.

    Returns:
        (NB * 16, STEP) DT.
    """
    w = _words(w, PIECE, NB, STEP)
    u = w >> 8
    KEPT: tl.constexpr = 2 if HIGH else 3
    M0: tl.constexpr = KEPT * 0x00010001
    M1: tl.constexpr = KEPT * 0x00040004
    M2: tl.constexpr = KEPT * 0x00100010
    M3: tl.constexpr = KEPT * 0x00400040
    if STEP == 32:
        if PIECE % 2 == 0:
            pairs = _join4(w & M0, w & M1, w & M2, w & M3)
        else:
            pairs = _join4(u & M0, u & M1, u & M2, u & M3)
    else:
        pairs = _join8(w & M0, w & M1, w & M2, w & M3, u & M0, u & M1, u & M2, u & M3)
    return _operand(pairs, NB, STEP, SUB, KW4, DT)


@triton.jit
def unpack_two(
    a,
    b,
    PIECE: tl.constexpr,
    NB: tl.constexpr,
    STEP: tl.constexpr,
    SUB: tl.constexpr,
    KW4: tl.constexpr,
    DT: tl.constexpr,
):
    """Codes of two units at once, ``4 a + b``, times ``16 ** (column / 16 % 2)``. Arguments as in `unpack_one`."""
    a = _words(a, PIECE, NB, STEP)
    b = _words(b, PIECE, NB, STEP)
    A0: tl.constexpr = 0x000C000C
    A1: tl.constexpr = 0x00C000C0
    B0: tl.constexpr = 0x00030003
    B1: tl.constexpr = 0x00300030
    if STEP == 32:
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
    return _operand(pairs, NB, STEP, SUB, KW4, DT)


@triton.jit
def scale_of(meta):
    """The scale of a word of `KernelWeights.meta`, float32."""
    return (meta << 16).to(tl.float32, bitcast=True)


@triton.jit
def bias_of(meta):
    """The bias of a word of `KernelWeights.meta`, float32."""
    return (meta & -65536).to(tl.float32, bitcast=True)
