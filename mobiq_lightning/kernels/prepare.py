"""One launch in front of a product: norm or gating, router, and the tokens in the order and scale that the products want.

What a token reads is decided here, on the device, and stays there; `route` has that part.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobiq_lightning.kernels.form import Form, Prepared
from mobiq_lightning.kernels.layout import TILE_COLUMNS, KernelWeights
from mobiq_lightning.kernels.route import route, store_info
from mobiq_lightning.kernels.routing import MAX_ROUTED, Routing

_TILE = tl.constexpr(TILE_COLUMNS)
_NO_ROUTER_WIDTH = 16
"""Hidden units that the launch is divided for where there is no router."""


@triton.jit
def _place_of(k, MMA_SYNC_ORDER: tl.constexpr):
    """Where column `k` goes among the prepared columns."""
    if MMA_SYNC_ORDER:
        place = (k & -64) + ((k >> 4) & 3) * 16 + ((k >> 1) & 3) * 4 + ((k >> 3) & 1) * 2 + (k & 1)
    else:
        place = k
    return place


@triton.jit(do_not_specialize=["M", "tokens_per_threshold"])
def prepare_kernel(
    x,
    factor,
    y,
    x_one,
    x_two,
    sums,
    bits,
    info,
    router_hidden,
    router_small,
    thresholds,
    depths,
    valid,
    bits_read,
    tokens_read,
    part,
    counters,
    M,
    K,
    T,
    x_stride,
    factor_stride,
    tokens_per_threshold,
    eps,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BK_ROW: tl.constexpr,
    BH: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    N_SLICES: tl.constexpr,
    USE_NORM: tl.constexpr,
    USE_GATE: tl.constexpr,
    USE_ROUTER: tl.constexpr,
    COUNT_READS: tl.constexpr,
    STORE_INFO: tl.constexpr,
    MMA_SYNC_ORDER: tl.constexpr,
    SCALE: tl.constexpr,
    UNSCALE: tl.constexpr,
):
    """Prepares BT tiles of columns of one token.

    Args:
        x: (M, K) tokens; in front of the norm if USE_NORM, the output of the gate if USE_GATE.
        factor: (K,) weight of the norm if USE_NORM, (M, K) second factor if USE_GATE; else not used.
        y: (M, K), takes what router and product are given, if USE_NORM or USE_GATE; else not used.
        x_one: (M, T * 128), takes the tokens prepared for one unit at a time.
        x_two: (M, T * 128), takes the tokens prepared for two units at once.
        sums: (T * 128 / BK, M) float32, takes sums of the tokens over each step of columns.
        bits: (M,) int32 depths; taken from the router if USE_ROUTER.
        info: (3,) int32, takes lowest and highest depth, and a mask of units of which a token reads the upper bit alone.
        router_hidden, router_small, depths, counters: Fields of `RouterWeights`, used if USE_ROUTER.
        thresholds, bits_read, tokens_read, valid: Fields of `Routing`, used if USE_ROUTER.
        part: (M, programs per token, BH + 1) float32, what programs leave for the last one, if USE_ROUTER.
        M: Tokens.
        K: Columns of the input.
        T: Tiles of 128 columns in the kernels' order.
        x_stride: Elements from one token of `x` to the next.
        factor_stride: Elements from one token of `factor` to the next.
        tokens_per_threshold: How many tokens one after the other share a threshold.
        eps: Epsilon of the norm.
        BT: Tiles of a program.
        BK: Columns of a step: 32, 64 or 128.
        BK_ROW: All columns of a token, K padded to a power of two.
        BH: Units of the router's hidden layer, padded to a power of two.
        BS: Scores of the router, padded to a power of two.
        BP: Programs of a token, padded to a power of two.
        GROUP_SIZE: Columns that share a scale.
        PADDED_GROUP: Columns that a group takes in the kernels' order.
        N_SLICES: Slices that the weights hold.
        USE_NORM: Whether an RMS norm comes first.
        USE_GATE: Whether the tokens are ``silu(x) * factor``.
        USE_ROUTER: Whether the router decides how deep tokens read.
        COUNT_READS: Whether what the router decides is counted.
        STORE_INFO: Whether `info` is stored, for up to 64 tokens.
        MMA_SYNC_ORDER: Whether columns go in the order that ``mma.sync`` wants, instead of that of ``wgmma``.
        SCALE: Factor of the prepared tokens.
        UNSCALE: Factor that the products put on their sums.
    """
    m = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    tile = program * BT + tl.arange(0, BT)  # [BT]
    k = tile[:, None] * _TILE + tl.arange(0, _TILE)[None, :]  # [BT, 128]
    is_inside = tile[:, None] < T  # [BT, 1]
    source = (k // PADDED_GROUP) * GROUP_SIZE + k % PADDED_GROUP  # [BT, 128] columns of the input
    is_source = (k % PADDED_GROUP < GROUP_SIZE) & (source < K)
    v = tl.load(x + m * x_stride + source, mask=is_source, other=0.0).to(tl.float32)  # [BT, 128]
    if USE_NORM:
        column = tl.arange(0, BK_ROW)  # [BK_ROW]
        row = tl.load(x + m * x_stride + column, mask=column < K, other=0.0).to(tl.float32)  # [BK_ROW]
        v = v * tl.rsqrt(tl.sum(row * row, 0) / K + eps)
        v = v.to(x.dtype.element_ty).to(tl.float32)
        v = v * tl.load(factor + source, mask=is_source, other=0.0).to(tl.float32)
    if USE_GATE:
        v = (v * tl.sigmoid(v)).to(x.dtype.element_ty).to(tl.float32)
        v = v * tl.load(factor + m * factor_stride + source, mask=is_source, other=0.0).to(tl.float32)
    v = v.to(x.dtype.element_ty)
    if USE_NORM or USE_GATE:
        tl.store(y + m * K + source, v, mask=is_source)
    v = v.to(tl.float32)

    PIECES: tl.constexpr = _TILE // BK
    step_sums = tl.sum(v.reshape(BT, PIECES, BK), 2) / UNSCALE  # [BT, PIECES]
    step = tile[:, None] * PIECES + tl.arange(0, PIECES)[None, :]  # [BT, PIECES]
    tl.store(sums + step * M + m, step_sums, mask=is_inside)
    at = m * T * _TILE + _place_of(k, MMA_SYNC_ORDER)  # [BT, 128]
    # What undoes the factor that a code has because it is used where it lies in its word.
    worth_one = tl.exp2(-2.0 * ((k >> 3) & 3).to(tl.float32)) * SCALE  # [BT, 128]
    worth_two = tl.exp2(-4.0 * ((k >> 4) & 1).to(tl.float32)) * SCALE  # [BT, 128]
    tl.store(x_one + at, (v * worth_one).to(x_one.dtype.element_ty), mask=is_inside)
    tl.store(x_two + at, (v * worth_two).to(x_two.dtype.element_ty), mask=is_inside)

    if USE_ROUTER:
        route(
            v, k, is_inside, m, program, tl.num_programs(1), part, counters, router_hidden, router_small, thresholds,
            depths, valid, bits_read, tokens_read, bits, info, M, K, tokens_per_threshold,
            COUNT_READS=COUNT_READS, N_SLICES=N_SLICES, BH=BH, BS=BS, BP=BP,
        )  # fmt: skip
    elif STORE_INFO & (m == 0) & (program == 0):
        store_info(bits, info, M)


def prepare(
    x: Tensor,
    weights: KernelWeights,
    form: Form,
    bits: Tensor | None = None,
    routing: Routing | None = None,
    norm: tuple[Tensor, float] | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Prepared]:
    """Prepares tokens for products with `weights`.

    Args:
        x: (M, I) tokens; in front of the norm if `norm` is given, the gate's output if `up` is.
        weights: The weights that they are multiplied with.
        form: Order and scale of the prepared tokens.
        bits: (M,) int32 depths; None if `routing` decides.
        routing: The router that decides depths, for up to `MAX_ROUTED` tokens; None if `bits` are given.
        norm: Weight (I,) and epsilon of an RMS norm that comes first.
        up: (M, I) second factor of a gated input: the tokens are ``silu(x) * up``.

    Returns:
        The tokens that router and product are given, (M, I), and the prepared ones.

    Raises:
        ValueError: If neither or both of `bits` and `routing` are given, there are too many tokens to route, or both
            `norm` and `up` are given.
    """
    tokens, columns = x.shape
    if (bits is None) == (routing is None) or (routing is not None and tokens > MAX_ROUTED):
        raise ValueError(f"give either bits or, for up to {MAX_ROUTED} tokens, routing; there are {tokens} tokens")
    if norm is not None and up is not None:
        raise ValueError("give norm or up, not both")
    x = _with_whole_rows(x)
    width = routing.router.width if routing is not None else _NO_ROUTER_WIDTH
    tiles = max(1, min(4, 64 // width))
    programs = triton.cdiv(weights.tiles, tiles)

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=x.device)

    y = new(tokens, columns, dtype=x.dtype) if norm is not None or up is not None else x
    prepared = Prepared(
        new(tokens, weights.tiles * TILE_COLUMNS, dtype=form.dtype),
        new(tokens, weights.tiles * TILE_COLUMNS, dtype=form.dtype),
        new(weights.tiles * TILE_COLUMNS // weights.step, tokens, dtype=torch.float32),
        new(tokens, dtype=torch.int32) if bits is None else bits,
        new(3, dtype=torch.int32),
        form,
        x.dtype,
    )
    factor = norm[0] if norm is not None else _with_whole_rows(up) if up is not None else x
    part = new(tokens * programs * (width + 1), dtype=torch.float32) if routing is not None else prepared.sums
    prepare_kernel[(tokens, programs)](
        x=x,
        factor=factor,
        y=y,
        x_one=prepared.one,
        x_two=prepared.two,
        sums=prepared.sums,
        bits=prepared.bits,
        info=prepared.info,
        part=part,
        M=tokens,
        K=columns,
        T=weights.tiles,
        x_stride=x.stride(0),
        factor_stride=factor.stride(0),
        eps=norm[1] if norm is not None else 0.0,
        BT=tiles,
        BK=weights.step,
        BK_ROW=triton.next_power_of_2(columns),
        BH=width,
        BS=triton.next_power_of_2(max(2, len(weights.slice_bits))),
        BP=triton.next_power_of_2(programs),
        GROUP_SIZE=weights.group_size,
        PADDED_GROUP=weights.padded_group,
        N_SLICES=len(weights.slice_bits),
        USE_NORM=norm is not None,
        USE_GATE=up is not None,
        STORE_INFO=tokens <= MAX_ROUTED,
        MMA_SYNC_ORDER=form.mma_sync_order,
        SCALE=form.scale,
        UNSCALE=form.unscale,
        num_warps=4,
        enable_fp_fusion=True,
        **_routing_arguments(routing, tokens, unused=prepared.info),
    )
    return y, prepared


def _routing_arguments(routing: Routing | None, tokens: int, unused: Tensor) -> dict[str, Any]:
    """Arguments of `prepare_kernel` that say how tokens are routed; pointers that it does not use are `unused`."""
    if routing is None:
        pointers = ("router_hidden", "router_small", "thresholds", "depths", "valid", "bits_read", "tokens_read")
        arguments: dict[str, Any] = dict.fromkeys((*pointers, "counters"), unused)
        return {**arguments, "tokens_per_threshold": 1, "USE_ROUTER": False, "COUNT_READS": False}
    return {
        "router_hidden": routing.router.hidden,
        "router_small": routing.router.small,
        "thresholds": routing.thresholds,
        "depths": routing.router.depths,
        "valid": unused if routing.valid is None else routing.valid,
        "bits_read": routing.bits_read,
        "tokens_read": routing.tokens_read,
        "counters": routing.router.counters,
        "tokens_per_threshold": max(1, tokens // len(routing.thresholds)),
        "USE_ROUTER": True,
        "COUNT_READS": routing.valid is not None,
    }


def _with_whole_rows(x: Tensor) -> Tensor:
    """Tokens whose columns lie beside each other; the rows may be parts of longer ones, as those of a fused product are."""
    return x if x.stride(-1) == 1 else x.contiguous()
