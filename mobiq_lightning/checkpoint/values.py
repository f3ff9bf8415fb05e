"""Which values the tensors of a checkpoint may have, however their bytes compare with what was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mobiq_lightning.packing import BUDGETS, carrier_of, input_tensor_name, kind_of


def value_problems(name: str, tensor_of: Callable[[str], Tensor], falls: bool) -> Iterator[str]:
    """Yields what is wrong with the values of one tensor, one line each.

    Args:
        name: Name of the tensor.
        tensor_of: Function that gives a tensor of the checkpoint by its name; it is not called for bit planes, of which every
            byte is a valid code.
        falls: Whether thresholds must fall as budgets rise. With routers that allocate whole inputs they need not.
    """
    kind = kind_of(name)
    if kind == "plane":
        return
    value = tensor_of(name)
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        yield f"{name}: {int((~torch.isfinite(value)).sum())} of {value.numel()} values are NaN or infinite"
    elif kind == "thresholds":
        if falls and value.ndim == 2 and not bool((value[:, 1:] <= value[:, :-1]).all()):
            row, column = (value[:, 1:] > value[:, :-1]).nonzero()[0].tolist()
            budgets = tensor_of(input_tensor_name(carrier_of(name), BUDGETS)).tolist()
            yield (
                f"{name}: thresholds must not rise with the budget; they do from {budgets[column]:g} to "
                f"{budgets[column + 1]:g} bits (slices held: {row + 1})"
            )
    elif kind == "budgets":
        if not bool((value.diff() > 0).all()):
            yield f"{name}: budgets must rise from one to the next, and do not"
    elif (kind == "scale" or (kind == "transform" and name.endswith(".scale"))) and not bool((value > 0).all()):
        yield f"{name}: {int((value <= 0).sum())} of {value.numel()} scales are not above 0"
