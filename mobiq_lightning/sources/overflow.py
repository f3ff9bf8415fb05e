"""Numbers that are not finite: whether there are any, and in which layer of a model they begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.errors import GuardError, ModelError

_AT_ONCE = 2**24
"""Numbers that are looked at in one go."""


def is_finite(values: Tensor) -> bool:
    """Whether all numbers of a tensor are finite, found without a copy of its size."""
    for part in values.detach().flatten().split(_AT_ONCE):
        low, high = torch.aminmax(part)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            return False
    return True


@torch.no_grad()
def check_output(output: Tensor, module: nn.Module, again: Callable[[], object], place: str, reading: str = "") -> None:
    """Refuses what a part of a model gives on calibration windows if it is not finite.

    Args:
        output: What it gave.
        module: The part: a block, or the whole model.
        again: Computes the same once more, so that the layer can be found where it begins.
        place: Name of the part, for the message.
        reading: How deep its weights were read, for the message; empty in full precision.

    Raises:
        ModelError: If the model itself gives such numbers, or its dtype is too narrow for what calibrated weights give.
        GuardError: If calibrated weights give them.
    """
    if not output.numel() or is_finite(output):
        return
    begins = _find_begin(module, again)
    dtype = str(output.dtype).removeprefix("torch.")
    bad = int((~torch.isfinite(output)).sum())
    what = f"{place}{f' read at {reading}' if reading else ''} gives {bad} of {output.numel()} numbers that are NaN or infinite"
    largest = f"{begins.layer or 'it'} was given numbers up to {begins.largest:.4g} and computes in {dtype}"
    largest += ", which ends at 65504" if output.dtype == torch.float16 else ""
    said = f"{what} on this text: {largest}"
    if output.dtype == torch.float16:
        raise ModelError(f"{said}. Use model.dtype bfloat16 or float32, and start again with --overwrite")
    if not reading:
        advice = "" if output.dtype == torch.float32 else "use model.dtype float32, or "
        raise ModelError(
            f"{said}. Nothing was calibrated there yet, so it is the model: {advice}download it again if it is damaged"
        )
    raise GuardError(
        f"{said}, though the full-precision model is finite: what was learned there does harm. Set worse_block and "
        "exploding_probe of the callback Guards to repair, and start again with --overwrite"
    )


@dataclass
class _Begin:
    """Where numbers stop being finite: the first layer that gives such, and the largest number that it was given."""

    layer: str = ""
    largest: float = 0.0


def _find_begin(module: nn.Module, again: Callable[[], object]) -> _Begin:
    found: list[_Begin] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            given = [t for t in inputs if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
            first = output[0] if isinstance(output, tuple) else output
            floating = isinstance(first, Tensor) and first.is_floating_point()
            if not found and floating and not is_finite(first):
                finite = [t.abs().float().nan_to_num(0.0, 0.0).max().item() for t in given]
                found.append(_Begin(name, max(finite, default=0.0)))

        return hook

    handles = [part.register_forward_hook(look(name)) for name, part in module.named_modules() if name]
    try:
        again()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else _Begin()
