"""Values that are stored in fewer bits where that changes none of them."""

from __future__ import annotations

import torch
from torch import Tensor

STORED_DTYPE = torch.bfloat16
"""The dtype that the parameters of routers are rounded to once they are trained, and stored in."""


def compact(tensor: Tensor) -> Tensor:
    """Gives a floating tensor in bfloat16 if that changes none of its values, and any other tensor as it is."""
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(STORED_DTYPE)
    return stored if bool((stored.to(tensor.dtype) == tensor).all()) else tensor
