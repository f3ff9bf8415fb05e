"""One launch in front of a product: norm or gating, router, and the tokens in the order and scale that the products want.

What a token reads is decided here, on the device, and stays there. Each token is shared by several programs; the one that
finishes last adds up what the router's hidden layer was given and decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobiq_lightning.kernels.layout import TILE_COLUMNS, KernelWeights
from mobiq_lightning.kernels.routing import MAX_ROUTED, Routing

_TILE = tl.constexpr(TILE_COLUMNS)
_PLAIN, _NORM, _GATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class Form:
    """In which order and scale tokens are prepared.

    Args:
        dtype: Of the prepared tokens.
        sub: Whether codes are taken as subnormal numbers of that type, see `unpack`.
        kw4: Whether columns are in the order of `mma.sync`'s wider operand instead of that of `wgmma`.
    """

    dtype: torch.dtype
    sub: bool
    kw4: bool

    @classmethod
    def of(cls, tokens: int, dtype: torch.dtype, capability: tuple[int, int], interpreted: bool) -> Form:
        """For a product of so many tokens.

        Args:
            tokens: Up to 8 are multiplied by `mma.sync` with eight columns, more by `wgmma` where there is one.
            dtype: Of the tokens.
            capability: Compute capability of the device.
            interpreted: Triton's interpreter multiplies the bits of bfloat16 as integers, so float32 is used there.
        """
        kw4 = tokens <= 8 or capability < (9, 0)
        return cls(torch.float32, False, kw4) if interpreted else cls(dtype, True, kw4)

    @property
    def scale(self) -> float:
        """What tokens are multiplied by: bfloat16 codes are worth 2^-133, too little for a product in range."""
        return 2.0**100 if self.sub and self.dtype == torch.bfloat16 else 1.0

    @property
    def back(self) -> float:
        """What sums of products are multiplied by, so that codes are worth what they are."""
        if not self.sub:
            return 1.0
        return 2.0**33 if self.dtype == torch.bfloat16 else 2.0**24


@dataclass(frozen=True)
class Prepared:
    """Tokens as the products want them.

    Args:
        one: (M, T * 128), each column times ``4 ** -(column / 8 % 4)``: for one unit at a time.
        two: (M, T * 128), each column times ``16 ** -(column / 16 % 2)``: for two units at a time.
        sums: (T * 128 / step, M) float32, sums over each step of columns.
        bits: (M,) int32, the depth of each token.
        info: (3,) int32: lowest and highest depth, and a mask of units of which a token reads the upper bit alone.
        form: Order and scale.
        dtype: Of the tokens as they were given.
    """

    one: Tensor
    two: Tensor
    sums: Tensor
    bits: Tensor
    info: Tensor
    form: Form
    dtype: torch.dtype


@triton.jit
def _store_info(bits, info, M, MI: tl.constexpr):
    rm = tl.arange(0, MI)
    live = rm < M
    depth = tl.load(bits + rm, mask=live, other=0, cache_modifier=".cg")
    odd = live & (depth % 2 == 1)
    mask = 0
    for unit in tl.static_range(4):
        mask += tl.max((odd & (depth // 2 == unit)).to(tl.int32), 0) << unit
    tl.store(info, tl.min(tl.where(live, depth, 64), 0))
    tl.store(info + 1, tl.max(depth, 0))
    tl.store(info + 2, mask)


@triton.jit(do_not_specialize=["M", "per_row"])
def prepare_kernel(
    x,
    other,
    y,
    one,
    two,
    sums,
    bits,
    info,
    hidden,
    small,
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
    other_stride,
    per_row,
    eps,
    MODE: tl.constexpr,
    ROUTE: tl.constexpr,
    COUNT: tl.constexpr,
    INFO: tl.constexpr,
    CT: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    KP: tl.constexpr,
    HP: tl.constexpr,
    SLICES: tl.constexpr,
    SP: tl.constexpr,
    PP: tl.constexpr,
    MI: tl.constexpr,
    SCALE: tl.constexpr,
    BACK: tl.constexpr,
    KW4: tl.constexpr,
):
    """One program: CT tiles of columns of one token.

    Arguments as in `prepare` and `RouterWeights`. Unless MODE is 0, y (M, K) takes what router and product are given.
    """
    m = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1)
    n_parts = tl.num_programs(1)
    tile = p * CT + tl.arange(0, CT)
    k = tile[:, None] * _TILE + tl.arange(0, _TILE)[None, :]
    inside = tile[:, None] < T
    source = (k // PADDED) * GROUP + k % PADDED
    ok = (k % PADDED < GROUP) & (source < K)
    v = tl.load(x + m * x_stride + source, mask=ok, other=0.0).to(tl.float32)
    if MODE == _NORM:
        row = tl.arange(0, KP)
        whole = tl.load(x + m * x_stride + row, mask=row < K, other=0.0).to(tl.float32)
        v = v * tl.rsqrt(tl.sum(whole * whole, 0) / K + eps)
        v = v.to(x.dtype.element_ty).to(tl.float32) * tl.load(other + source, mask=ok, other=0.0).to(tl.float32)
    if MODE == _GATED:
        v = (v * tl.sigmoid(v)).to(x.dtype.element_ty).to(tl.float32)
        v = v * tl.load(other + m * other_stride + source, mask=ok, other=0.0).to(tl.float32)
    v = v.to(x.dtype.element_ty)
    if MODE != _PLAIN:
        tl.store(y + m * K + source, v, mask=ok)
    v = v.to(tl.float32)

    PIECES: tl.constexpr = _TILE // STEP
    sum_of = tl.sum(v.reshape(CT, PIECES, STEP), 2) / BACK
    step = tile[:, None] * PIECES + tl.arange(0, PIECES)[None, :]
    tl.store(sums + step * M + m, sum_of, mask=inside)
    if KW4:
        at = (k & -64) + ((k >> 4) & 3) * 16 + ((k >> 1) & 3) * 4 + ((k >> 3) & 1) * 2 + (k & 1)
    else:
        at = k
    at = m * T * _TILE + at
    place_one = tl.exp2(-2.0 * ((k >> 3) & 3).to(tl.float32)) * SCALE
    place_two = tl.exp2(-4.0 * ((k >> 4) & 1).to(tl.float32)) * SCALE
    tl.store(one + at, (v * place_one).to(one.dtype.element_ty), mask=inside)
    tl.store(two + at, (v * place_two).to(two.dtype.element_ty), mask=inside)

    if ROUTE:
        rh = tl.arange(0, HP)
        w = tl.load(hidden + k[:, :, None] * HP + rh[None, None, :], mask=inside[:, :, None], other=0.0)
        mine = part + (m * n_parts + p) * (HP + 1)
        tl.store(mine + rh, tl.sum(tl.sum(w * v[:, :, None], 1), 0))
        tl.store(mine + HP, tl.sum(tl.sum(v * v, 1), 0))
        tl.debug_barrier()
        if tl.atomic_add(counters + m, 1, sem="acq_rel") == n_parts - 1:
            tl.debug_barrier()
            tl.atomic_xchg(counters + m, 0)
            rp = tl.arange(0, PP)
            theirs = part + (m * n_parts + rp) * (HP + 1)
            there = rp < n_parts
            dots = tl.load(theirs[:, None] + rh[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg")
            squares = tl.load(theirs + HP, mask=there, other=0.0, cache_modifier=".cg")
            rms = tl.sqrt(tl.sum(squares, 0) / K + 1e-12)
            # Rows of `small`: weights of log(rms), biases of the hidden layer, then a row of weights for each score.
            h = tl.sum(dots, 0) / rms + tl.load(small + rh) * tl.log(rms) + tl.load(small + HP + rh)
            h = h * tl.sigmoid(h)
            rs = tl.arange(0, SP)
            scored = rs < SLICES - 1
            weight = tl.load(small + (2 + rs[:, None]) * HP + rh[None, :], mask=scored[:, None], other=0.0)
            score = tl.sum(weight * h[None, :], 1) + tl.load(small + (2 + SP) * HP + rs, mask=scored, other=0.0)
            threshold = tl.load(thresholds + m // per_row)
            # A slice is read only if all before it are: the first closed one ends the reading.
            n_open = tl.min(tl.where((score > threshold) & scored, SLICES, rs), 0)
            depth = tl.load(depths + tl.minimum(n_open, SLICES - 1))
            tl.store(bits + m, depth)
            if COUNT:
                counted = tl.load(valid + m).to(tl.int64)
                tl.atomic_add(bits_read + m // per_row, depth.to(tl.int64) * counted, sem="relaxed")
                tl.atomic_add(tokens_read + m // per_row, counted, sem="relaxed")
            tl.debug_barrier()
            if tl.atomic_add(counters + MI, 1, sem="acq_rel") == M - 1:
                tl.debug_barrier()
                tl.atomic_xchg(counters + MI, 0)
                _store_info(bits, info, M, MI)
    elif INFO & (m == 0) & (p == 0):
        _store_info(bits, info, M, MI)


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
        weights: What they are multiplied with.
        form: Order and scale.
        bits: (M,) int32 depths; or
        routing: the router that decides, for up to `MAX_ROUTED` tokens.
        norm: Weight (I,) and epsilon of an RMS norm that comes first.
        up: (M, I): the tokens are ``silu(x) * up``.

    Returns:
        The tokens that router and product are given, (M, I), and the prepared ones.
    """
    tokens, columns = x.shape
    if (bits is None) == (routing is None) or (routing is not None and tokens > MAX_ROUTED):
        raise ValueError(f"give either bits or, for up to {MAX_ROUTED} tokens, routing; there are {tokens} tokens")
    if norm is not None and up is not None:
        raise ValueError("give norm or up, not both")
    x = _with_whole_rows(x)
    router = routing.router if routing is not None else None
    width = router.width if router is not None else 16
    tiles = max(1, min(4, 64 // width))
    parts = triton.cdiv(weights.tiles, tiles)

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
    other = norm[0] if norm is not None else _with_whole_rows(up) if up is not None else x
    part = new(tokens * parts * (width + 1), dtype=torch.float32) if router is not None else prepared.sums
    none = prepared.info  # where a pointer is not used
    count = routing is not None and routing.valid is not None
    prepare_kernel[(tokens, parts)](
        x,
        other,
        y,
        prepared.one,
        prepared.two,
        prepared.sums,
        prepared.bits,
        prepared.info,
        router.hidden if router is not None else none,
        router.small if router is not None else none,
        routing.thresholds if routing is not None else none,
        router.depths if router is not None else none,
        routing.valid if count and routing is not None else none,
        routing.bits_read if routing is not None else none,
        routing.tokens_read if routing is not None else none,
        part,
        router.counters if router is not None else none,
        tokens,
        columns,
        weights.tiles,
        x.stride(0),
        other.stride(0),
        max(1, tokens // len(routing.thresholds)) if routing is not None else 1,
        norm[1] if norm is not None else 0.0,
        MODE=1 if norm is not None else 2 if up is not None else 0,
        ROUTE=int(router is not None),
        COUNT=int(count),
        INFO=int(tokens <= MAX_ROUTED),
        CT=tiles,
        GROUP=weights.group_size,
        PADDED=weights.padded_group,
        STEP=weights.step,
        KP=triton.next_power_of_2(columns),
        HP=width,
        SLICES=len(weights.slice_bits),
        SP=triton.next_power_of_2(max(2, len(weights.slice_bits))),
        PP=triton.next_power_of_2(parts),
        MI=MAX_ROUTED,
        SCALE=form.scale,
        BACK=form.back,
        KW4=int(form.kw4),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return y, prepared


def _with_whole_rows(x: Tensor) -> Tensor:
    """Tokens whose columns lie beside each other; the rows may be parts of longer ones, as those of a fused product are."""
    return x if x.stride(-1) == 1 else x.contiguous()
