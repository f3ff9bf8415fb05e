"""Which kernel multiplies: chosen by what the host knows, the number of tokens and the device, never by what was routed.

| tokens | product | why |
|---|---|---|
| 1 to 64 | `decode` | units are read once, and only those that a token needs |
| to `Table.grouped_until` | `grouped` | no plain weights are written |
| more | `dequantize`, then cuBLAS | bound by the tensor cores, so reading plain weights costs little |
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.kernels.decode import decode, decode_columns
from mobiq_lightning.kernels.dequantize import dequantize, dequantized_product
from mobiq_lightning.kernels.form import Form, Prepared
from mobiq_lightning.kernels.grouped import grouped, plan_tiles
from mobiq_lightning.kernels.layout import ROW_BLOCK, KernelWeights
from mobiq_lightning.kernels.prepare import prepare
from mobiq_lightning.kernels.routing import MAX_ROUTED, Routing
from mobiq_lightning.kernels.tuning import Table, table_for

Path = Literal["decode", "grouped", "dequantize"]
INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, on a CPU, to check them."""


def path_for(tokens: int, weights: KernelWeights, dtype: torch.dtype | None) -> Path:
    """The product that some tokens take.

    Args:
        tokens: Number of tokens M.
        weights: Weights in the kernels' order.
        dtype: dtype of the tokens; None if all read one depth that the host knows, because plain weights of one depth are
            multiplied in any dtype.

    Returns:
        ``decode``, ``grouped`` or ``dequantize``.
    """
    if tokens <= MAX_ROUTED:
        return "decode"
    table = _device(weights.units.device)[1]
    # The grouped product of cuBLAS and CUTLASS takes bfloat16 rows of whole 16 bytes.
    possible = INTERPRETED or (dtype in (None, torch.bfloat16) and weights.in_features % 8 == 0)
    return "dequantize" if tokens > table.grouped_until and possible else "grouped"


def multiply(
    x: Tensor,
    weights: KernelWeights,
    bits: Tensor,
    index: int | None = None,
    prepared: Prepared | None = None,
) -> Tensor:
    """``y[t] = W(bits[t]) @ x[t]``, on the device of the weights, without waiting for it.

    Args:
        x: (M, I) bfloat16 or float16.
        weights: Weights in the kernels' order.
        bits: (M,) integers, each one of `weights.depths`.
        index: Which of the linears is computed; by default all, the rows of each padded to a multiple of 128.
        prepared: What `prepare` made of the tokens, if it is at hand.

    Returns:
        (M, rows) in the dtype of `x`.
    """
    block0, rows = 0, weights.rows
    if index is not None:
        start = weights.row_starts[index]
        block0, rows = start // ROW_BLOCK, -(-weights.out_features[index] // ROW_BLOCK) * ROW_BLOCK
    tokens = x.shape[0]
    if tokens == 0:
        return x.new_empty(0, rows)
    path = path_for(tokens, weights, x.dtype)
    bits = bits.to(torch.int32)
    with _on(x):
        if path == "dequantize":
            plan = plan_tiles(bits, len(weights.depths), MAX_ROUTED)
            return dequantized_product(x, weights, plan, block0, rows)
        capability, table, processors = _device(x.device)
        if prepared is None:
            form = Form.of(tokens, x.dtype, capability, INTERPRETED)
            prepared = prepare(x, weights, form, bits)[1]
        if path == "grouped":
            return grouped(prepared, weights, block0, rows)
        config = table.decode_config(decode_columns(tokens), rows, weights.in_features)
        return decode(prepared, weights, config, processors, block0, rows)


def multiply_uniform(x: Tensor, weights: KernelWeights, depth: int) -> Tensor:
    """``y[t] = W(depth) @ x[t]`` for a depth that the host knows, so that plain weights of that depth alone are enough.

    Args:
        x: (M, I) bfloat16 or float16.
        weights: Weights in the kernels' order.
        depth: Bits that all tokens read, one of `weights.depths`.

    Returns:
        (M, rows) in the dtype of `x`; the rows of each linear are padded to a multiple of 128.
    """
    tokens = x.shape[0]
    if tokens > 0 and path_for(tokens, weights, None) == "dequantize":
        with _on(x):
            return F.linear(x, dequantize(weights, depth, x.dtype))
    return multiply(x, weights, torch.full((tokens,), depth, dtype=torch.int32, device=x.device))


def route_and_prepare(
    x: Tensor,
    weights: KernelWeights,
    routing: Routing,
    norm: tuple[Tensor, float] | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Prepared]:
    """Runs norm or gating, the router, and the preparation for products with `weights` in one launch.

    Args:
        x: (M, I) tokens, up to `MAX_ROUTED`; in front of the norm if `norm` is given, the gate's output if `up` is.
        weights: Weights in the kernels' order.
        routing: The router, its thresholds, and counters of what it decides.
        norm: Weight (I,) and epsilon of an RMS norm that comes first.
        up: (M, I) second factor of a gated input.

    Returns:
        The tokens (M, I) that the linears are given; the prepared ones, with their depths.
    """
    with _on(x):
        form = Form.of(x.shape[0], x.dtype, _device(x.device)[0], INTERPRETED)
        return prepare(x, weights, form, None, routing, norm, up)


@functools.cache
def _device(device: torch.device) -> tuple[tuple[int, int], Table, int]:
    """Compute capability, tuned table and number of streaming multiprocessors of a device."""
    if INTERPRETED:
        return (9, 0), table_for("interpreter"), 4
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), table_for(properties.name), properties.multi_processor_count


def _on(x: Tensor) -> torch.cuda.device:
    """Kernels are launched on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


@torch.library.custom_op("mobiq::kernel_linear", mutates_args=())
def kernel_linear(
    x: Tensor,
    units: Tensor,
    meta: Tensor,
    counters: Tensor,
    bits: Tensor,
    out_features: Sequence[int],
    in_features: int,
    group_size: int,
    slice_bits: Sequence[int],
    index: int,
) -> Tensor:
    """`multiply` as one operator, for compilers: which kernel runs depends on the number of tokens."""
    weights = KernelWeights(units, meta, counters, tuple(out_features), in_features, group_size, tuple(slice_bits))
    return multiply(x, weights, bits, index)[:, : out_features[index]].contiguous()


@kernel_linear.register_fake
def _(x: Tensor, units: Tensor, meta: Tensor, counters: Tensor, bits: Tensor, out_features: Sequence[int],
      in_features: int, group_size: int, slice_bits: Sequence[int], index: int) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], out_features[index])
