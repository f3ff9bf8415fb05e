"""Products with sliced weights. The public function is `sliced_linear`; `reference` defines what is correct.

`layout` brings the saved bit planes into the kernels' order; `dispatch` chooses among `decode`, `grouped` and `dequantize`;
`prepare` is what runs in front of them. Nothing here needs Triton until a kernel is asked for. README.md in this folder is
an introduction.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from mobiq_lightning.kernels.layout import KernelWeights, relay, restore
from mobiq_lightning.kernels.reference import mixed_depth_product, reference_linear
from mobiq_lightning.packing import PackedSlices, PackedWeight

MIN_CAPABILITY = (8, 0)
KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def sliced_linear(
    x: Tensor,
    packed: PackedWeight | KernelWeights,
    bits_per_token: Tensor,
    weight_at: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """``y[t] = W(bits_per_token[t]) @ x[t]``.

    A weight as it is saved is multiplied by the reference, on any device; one in the kernels' order, which `relay` makes, by
    the Triton kernels. Neither waits for the device to tell how tokens were routed, except the reference on a CPU.

    Args:
        x: (T, I) tokens; for the kernels bfloat16 or float16.
        packed: Sliced weight, as it is saved or in the kernels' order.
        bits_per_token: (T,) integers, each a depth that the weight holds.
        weight_at: Only for the reference: where to take a dequantized weight (O, I) from instead of unpacking it here, for
            callers that keep them. Not used while a model is compiled.

    Returns:
        (T, O) in the dtype of `x`; O are the rows of all linears of a `KernelWeights`, without their padding.

    Raises:
        ValueError: If the kernels cannot take the tokens.
    """
    if isinstance(packed, PackedWeight):
        return reference_linear(x, packed, bits_per_token, weight_at)
    from mobiq_lightning.kernels import dispatch

    reason = None if dispatch.INTERPRETED else missing_for_kernels(x.device, x.dtype)
    if reason:
        raise ValueError(f"the kernels cannot run: {reason}. Give the saved weight, `restore(packed, index)`")
    y = dispatch.multiply(x, packed, bits_per_token)
    rows = [y[:, s : s + n] for s, n in zip(packed.row_starts, packed.out_features, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def missing_for_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on a device, or None if they can.

    Args:
        device: Where tokens and weights are.
        dtype: dtype of the tokens.
    """
    if device.type != "cuda":
        return f"they need a CUDA device, the model is on {device.type}"
    if torch.version.hip is not None:
        return "they are written for NVIDIA's tensor cores, this is ROCm"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, they need 8.0 (A100) or newer"
    if dtype not in KERNEL_DTYPES:
        return f"they take bfloat16 and float16, the model computes in {str(dtype).removeprefix('torch.')}"
    return None


def missing_for_code(code: str) -> str | None:
    """Why the Triton kernels cannot read a code, or None if they can.

    Args:
        code: Name of the code, an entry of `mobiq_lightning.packing.CODES`.
    """
    if code == PackedSlices.code:
        return None
    return f"the weights are in the {code} code; the kernels read the {PackedSlices.code} code (ResidualSlices) alone"


__all__ = [
    "KernelWeights",
    "missing_for_code",
    "missing_for_kernels",
    "mixed_depth_product",
    "relay",
    "restore",
    "sliced_linear",
]
