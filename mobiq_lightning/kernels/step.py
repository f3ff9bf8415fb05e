"""The product of one step of columns, which `decode` and `grouped` add up."""

from __future__ import annotations

import triton
import triton.language as tl

from mobiq_lightning.kernels.unpack import bias_of, scale_of, unpack_one, unpack_two


@triton.jit
def centre_of(bits):
    """What the middle of a cell adds to ``code / 2**bits`` in units of the scale: ``2**-(bits + 1) - 1/2``."""
    return tl.exp2(-(bits + 1).to(tl.float32)) - 0.5


@triton.jit
def multiply_step(
    acc,
    a,
    b,
    xv,
    xg,
    centre,
    mv,
    unit,
    PIECE: tl.constexpr,
    KIND: tl.constexpr,
    NB: tl.constexpr,
    STEP: tl.constexpr,
    SUB: tl.constexpr,
    KW4: tl.constexpr,
    DT: tl.constexpr,
):
    """Adds one step of columns to the sums.

    Args:
        acc: (NB * 16, tokens) float32.
        a, b: (NB * 128,) words of one tile of a unit, and of the unit after it if KIND is 2.
        xv: (tokens, STEP) prepared tokens, zero where a token does not read this unit.
        xg: (tokens,) float32, their sums over the step, zero likewise.
        centre: (tokens,) of `centre_of`.
        mv: (NB * 16,) words of `KernelWeights.meta`.
        unit: Number of the (first) unit.
        PIECE: Which step of the tile.
        KIND: 0 for one whole unit, 1 for the upper bits of a unit, 2 for two units at once.
        NB, STEP, SUB, KW4, DT: As in `unpack_one`.
    """
    if KIND == 2:
        w = unpack_two(a, b, PIECE, NB, STEP, SUB, KW4, DT)
        weight = tl.where(unit == 0, 0.0625, 0.00390625)  # 4 ** -(unit + 2)
        back = 16.0
    else:
        w = unpack_one(a, PIECE, NB, STEP, KIND == 1, SUB, KW4, DT)
        weight = tl.where(unit == 0, 0.25, tl.where(unit == 1, 0.0625, tl.where(unit == 2, 0.015625, 0.00390625)))
        back = 4.0
    # What a group adds whatever its codes are, a token gets from the pass over its first unit.
    first = unit == 0
    start = tl.where(first, xg * centre * back, 0.0)
    dot = tl.dot(w, tl.trans(xv), tl.broadcast_to(start[None, :], acc.shape), input_precision="ieee")
    acc += (scale_of(mv) * weight)[:, None] * dot
    acc += tl.where(first, bias_of(mv), 0.0)[:, None] * xg[None, :]
    return acc
