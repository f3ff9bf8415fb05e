"""Checks that the kernels compute what they should on this device, before any of them is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from mobiq_lightning.errors import KernelError
from mobiq_lightning.kernels import relay
from mobiq_lightning.kernels.layout import KernelWeights
from mobiq_lightning.kernels.routing import MAX_ROUTED
from mobiq_lightning.kernels.tuning import table_for
from mobiq_lightning.latency.kernel_products import form_for
from mobiq_lightning.latency.reference_products import random_slices
from mobiq_lightning.latency.shapes import Shape
from mobiq_lightning.packing import PackedSlices

TOLERANCE = 1e-4
"""Largest error allowed in a float32 result, as a share of the largest result; tensor cores truncate their sums."""
SIZES = ((256, 512, 128), (80, 300, 48), (200, 1344, 128), (384, 4096, 64))
"""Sizes of the weights that are checked: rows, columns, and columns per group."""
TOKENS = (1, 5, 16, 33, 64, 130)

MANY = 8
"""Up to this many tokens, tokens are prepared for `decode` alone, so `grouped` is not checked."""


def check_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Compares the kernels `decode`, `grouped` and `dequantize` with exact results, on random weights and tokens.

    Args:
        device: Device that the kernels run on.
        dtype: dtype of the tokens.

    Returns:
        By name of the kernel, the largest relative error of its float32 results.

    Raises:
        KernelError: If a kernel is off by more than `TOLERANCE`, naming kernel, sizes and error; or if the tensor cores
            drop subnormal numbers, which the kernels unpack codes into.
    """
    from mobiq_lightning.kernels.dequantize import dequantize

    if device.type == "cuda":
        check_subnormals(device)
    generator = torch.Generator(device).manual_seed(0)
    worst = {"decode": 0.0, "grouped": 0.0, "dequantize": 0.0}
    for rows, columns, group in SIZES:
        shape = Shape("check", f"{rows}x{columns}", (rows,), columns, group_size=group)
        packed = random_slices(shape, rows, device, generator)
        weights = relay([packed])
        exact = {depth: packed.weight_at(depth) for depth in shape.depths}
        for depth in shape.depths:
            made = dequantize(weights, depth, torch.float32)[:rows]
            _note(worst, "dequantize", made.double(), exact[depth].double(), f"{shape.part} at {depth} bits")
        for count in TOKENS:
            x = torch.randn(count, columns, generator=generator, device=device).to(dtype)
            bits = torch.tensor([shape.depths[t % len(shape.depths)] for t in range(count)], device=device)
            wanted = exact_product(x, packed, bits)
            name = f"{shape.part}, groups of {group}, {count} tokens"
            for kernel, made in products_in_float32(x, weights, bits.int()).items():
                _note(worst, kernel, made[:, :rows].double(), wanted, name)
    return worst


def products_in_float32(x: Tensor, weights: KernelWeights, bits: Tensor) -> dict[str, Tensor]:
    """Multiplies M tokens by sliced weights with each of the kernels `decode` and `grouped` that takes so many tokens.

    Args:
        x: (M, I) tokens.
        weights: Weights in the kernels' order.
        bits: (M,) int32 depth in bits that each token reads.

    Returns:
        By name of the kernel, its results (M, padded rows) float32.
    """
    from mobiq_lightning.kernels.decode import decode, decode_columns
    from mobiq_lightning.kernels.dispatch import INTERPRETED
    from mobiq_lightning.kernels.grouped import grouped
    from mobiq_lightning.kernels.prepare import prepare

    prepared = prepare(x, weights, form_for(x), bits)[1]
    name = "interpreter" if INTERPRETED else torch.cuda.get_device_name(x.device)
    processors = 4 if INTERPRETED else torch.cuda.get_device_properties(x.device).multi_processor_count
    found: dict[str, Tensor] = {}
    if len(x) <= MAX_ROUTED:
        config = table_for(name).decode_config(decode_columns(len(x)), weights.rows, weights.in_features)
        found["decode"] = decode(prepared, weights, config, processors, dtype=torch.float32)
    if len(x) > MANY:
        found["grouped"] = grouped(prepared, weights, dtype=torch.float32)
    return found


def exact_product(x: Tensor, packed: PackedSlices, bits: Tensor) -> Tensor:
    """The exact product (M, O) float64 of M tokens with sliced weights, each token reading a depth of its own.

    Args:
        x: (M, I) tokens.
        packed: Sliced weights of O rows and I columns.
        bits: (M,) depth in bits that each token reads.
    """
    y = x.new_zeros(x.shape[0], packed.out_features, dtype=torch.float64)
    for depth in bits.unique().tolist():
        tokens = bits == depth
        y[tokens] = x[tokens].double() @ packed.weight_at(depth).double().t()
    return y


def check_subnormals(device: torch.device) -> None:
    """Checks that products on a device keep subnormal bfloat16 numbers, as which the kernels use the codes of weights.

    The numbers whose bit patterns are 0 to 255 are multiplied by a power of two, which must give those integers.

    Raises:
        KernelError: If the device drops one of them.
    """
    codes = torch.arange(256, dtype=torch.int16, device=device).view(torch.bfloat16)
    weights = torch.zeros(256, 64, dtype=torch.bfloat16, device=device)
    weights[:, 0] = codes
    x = torch.zeros(64, 16, dtype=torch.bfloat16, device=device)
    x[0] = 2.0**100
    found = (weights @ x).float() * 2.0**33
    wrong = int((found != torch.arange(256, device=device).float().unsqueeze(1)).any(1).sum())
    if wrong:
        raise KernelError(
            f"{torch.cuda.get_device_name(device)} drops subnormal bfloat16 numbers in its products ({wrong} of 256 codes "
            "came out wrong), and the kernels unpack codes into such numbers: they cannot be used here. Call "
            "model.switch_kernels(False)"
        )


def _note(worst: dict[str, float], kernel: str, made: Tensor, wanted: Tensor, where: str) -> None:
    error = float((made - wanted).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE:  # NaN is not
        raise KernelError(
            f"the kernel {kernel} is wrong on this device: {where}: relative error {error:.3g}, up to {TOLERANCE:g} is "
            "rounding. Nothing was timed. Call model.switch_kernels(False), and report this with the versions of torch and "
            "Triton"
        )
    worst[kernel] = max(worst[kernel], error)
