"""What processes that train together, each on its part of a batch, must know of each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_ALONE = ContextVar("alone", default=False)


def n_processes() -> int:
    """Processes that train together; 1 if there is but this one, and within `alone`."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized() and not _ALONE.get()
    return torch.distributed.get_world_size() if distributed else 1


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process asks the others for nothing, as for steps that each takes as often as it likes."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def gathered(values: Tensor) -> Tensor:
    """Values (N, ...) of all processes one after the other, without gradients; every process must give as many."""
    if n_processes() == 1:
        return values.detach()
    found = [torch.empty_like(values) for _ in range(n_processes())]
    torch.distributed.all_gather(found, values.detach().contiguous())
    return torch.cat(found)


def summed(value: Tensor) -> Tensor:
    """The sum of a value over all processes, each of which gets the gradient of what all of them make of it."""
    if n_processes() == 1:
        return value
    total: Tensor = _Sum.apply(value)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of the gradients that they have for it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        torch.distributed.all_reduce(total)
        return total
