"""The last part of `prepare_kernel`: how deep each token reads, decided on the device by whichever program finishes last."""

from __future__ import annotations

import triton
import triton.language as tl

from mobiq_lightning.kernels.routing import MAX_ROUTED

_MAX_ROUTED = tl.constexpr(MAX_ROUTED)


@triton.jit
def store_info(bits, info, M):
    """Stores what `decode` has to know of the depths of all tokens of a launch.

    Args:
        bits: (M,) int32 depths.
        info: (3,) int32, takes the lowest depth, the highest, and a mask of units of which a token reads the upper bit
            alone.
        M: Tokens, up to `MAX_ROUTED`.
    """
    m = tl.arange(0, _MAX_ROUTED)  # [64]
    is_token = m < M
    depth = tl.load(bits + m, mask=is_token, other=0, cache_modifier=".cg")  # [64]
    is_odd = is_token & (depth % 2 == 1)
    mask = 0
    for unit in tl.static_range(4):
        mask += tl.max((is_odd & (depth // 2 == unit)).to(tl.int32), 0) << unit
    tl.store(info, tl.min(tl.where(is_token, depth, 64), 0))
    tl.store(info + 1, tl.max(depth, 0))
    tl.store(info + 2, mask)


@triton.jit
def route(
    x,
    k,
    is_inside,
    m,
    program,
    n_programs,
    part,
    counters,
    router_hidden,
    router_small,
    thresholds,
    depths,
    valid,
    bits_read,
    tokens_read,
    bits,
    info,
    M,
    K,
    tokens_per_threshold,
    COUNT_READS: tl.constexpr,
    N_SLICES: tl.constexpr,
    BH: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
):
    """Adds what some columns of a token give the router; the program that is the token's last decides how deep it reads.

    Args:
        x: [BT, 128] float32 columns of one token that this program holds.
        k: [BT, 128] numbers of the columns in the kernels' order.
        is_inside: [BT, 1] whether a tile of columns exists.
        m: Number of the token.
        program: Number of this program among those of the token.
        n_programs: Programs of the token.
        part: (M, n_programs, BH + 1) float32, takes sums for the hidden layer and the sum of squares of each program.
        counters: (65,) int32 zeros: how many programs of each token are done, and last how many tokens. Left at zero.
        router_hidden: (T * 128, BH), see `RouterWeights.hidden`.
        router_small: Flat, see `RouterWeights.small`.
        thresholds: (R,) float32, one for each row of the batch, or one.
        depths: (S,) int32 bits read with 1, 2, ... slices.
        valid: (M,) integers, 0 for tokens that are not counted; only used if COUNT_READS.
        bits_read: (R,) int64, increased by the bits that tokens read, if COUNT_READS.
        tokens_read: (R,) int64, increased by the tokens, if COUNT_READS.
        bits: (M,) int32, takes the depths.
        info: (3,) int32, takes what `store_info` says.
        M: Tokens.
        K: Columns of the input.
        tokens_per_threshold: How many tokens one after the other share a threshold.
        COUNT_READS: Whether bits and tokens are counted.
        N_SLICES: Slices S that the weights hold.
        BH: Units of the router's hidden layer, padded to a power of two.
        BS: Scores, padded to a power of two.
        BP: Programs of a token, padded to a power of two.
    """
    h = tl.arange(0, BH)  # [BH]
    w = tl.load(router_hidden + k[:, :, None] * BH + h[None, None, :], mask=is_inside[:, :, None], other=0.0)
    own = part + (m * n_programs + program) * (BH + 1)
    tl.store(own + h, tl.sum(tl.sum(w * x[:, :, None], 1), 0))
    tl.store(own + BH, tl.sum(tl.sum(x * x, 1), 0))
    tl.debug_barrier()
    if tl.atomic_add(counters + m, 1, sem="acq_rel") == n_programs - 1:
        tl.debug_barrier()
        tl.atomic_xchg(counters + m, 0)
        score = _scores(part, m, n_programs, router_small, K, N_SLICES, BH, BS, BP)  # [BS]
        s = tl.arange(0, BS)  # [BS]
        threshold = tl.load(thresholds + m // tokens_per_threshold)
        # A slice is read only if all before it are: the first closed one ends the reading.
        n_open = tl.min(tl.where((score > threshold) & (s < N_SLICES - 1), N_SLICES, s), 0)
        depth = tl.load(depths + tl.minimum(n_open, N_SLICES - 1))
        tl.store(bits + m, depth)
        if COUNT_READS:
            counted = tl.load(valid + m).to(tl.int64)
            tl.atomic_add(bits_read + m // tokens_per_threshold, depth.to(tl.int64) * counted, sem="relaxed")
            tl.atomic_add(tokens_read + m // tokens_per_threshold, counted, sem="relaxed")
        tl.debug_barrier()
        if tl.atomic_add(counters + _MAX_ROUTED, 1, sem="acq_rel") == M - 1:
            tl.debug_barrier()
            tl.atomic_xchg(counters + _MAX_ROUTED, 0)
            store_info(bits, info, M)


@triton.jit
def _scores(
    part,
    m,
    n_programs,
    router_small,
    K,
    N_SLICES: tl.constexpr,
    BH: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
):
    """The router's scores [BS] of token `m`, from what all of its programs have stored."""
    h = tl.arange(0, BH)  # [BH]
    p = tl.arange(0, BP)  # [BP]
    stored = part + (m * n_programs + p) * (BH + 1)  # [BP]
    is_there = p < n_programs
    dots = tl.load(stored[:, None] + h[None, :], mask=is_there[:, None], other=0.0, cache_modifier=".cg")  # [BP, BH]
    squares = tl.load(stored + BH, mask=is_there, other=0.0, cache_modifier=".cg")  # [BP]
    rms = tl.sqrt(tl.sum(squares, 0) / K + 1e-12)
    # Rows of `router_small`: weights of log(rms), biases of the hidden layer, then a row of weights for each score.
    hidden = tl.sum(dots, 0) / rms + tl.load(router_small + h) * tl.log(rms) + tl.load(router_small + BH + h)  # [BH]
    hidden = hidden * tl.sigmoid(hidden)
    s = tl.arange(0, BS)  # [BS]
    is_score = s < N_SLICES - 1
    weight = tl.load(router_small + (2 + s[:, None]) * BH + h[None, :], mask=is_score[:, None], other=0.0)  # [BS, BH]
    return tl.sum(weight * hidden[None, :], 1) + tl.load(router_small + (2 + BS) * BH + s, mask=is_score, other=0.0)
