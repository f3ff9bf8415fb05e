"""What several processes of one run share out among themselves, and put together again."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from mobiq_lightning.strategies.together import n_processes

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration

T = TypeVar("T")


def share_of_windows(module: ElasticCalibration, windows: Tensor) -> Tensor:
    """The windows of (N, ...) that this process works on: one of each N in turn; all if there are fewer than processes."""
    world = module.trainer.world_size
    return windows[module.trainer.global_rank :: world] if _shared(module, len(windows)) else windows


def gather_windows(module: ElasticCalibration, own: Tensor, n_windows: int, dim: int) -> Tensor:
    """What the processes have made of their shares, put together in the order of all windows, on the host.

    Args:
        module: The calibration.
        own: What this process has made of its share, with its windows along `dim`.
        n_windows: Windows of all processes.
        dim: The dimension of the windows.
    """
    world = module.trainer.world_size
    if world == 1 or not _shared(module, n_windows):
        return own.cpu()
    found: list[Tensor] = [own] * world
    torch.distributed.all_gather_object(found, own.cpu())
    order = torch.cat([torch.arange(rank, n_windows, world) for rank in range(world)])
    return torch.cat(found, dim).index_select(dim, order.argsort())


def summed_over_ranks(module: ElasticCalibration, own: Tensor, n_windows: int) -> Tensor:
    """The sum over processes of what each has made of its share of so many windows."""
    if module.trainer.world_size == 1 or not _shared(module, n_windows):
        return own
    total: Tensor = module.trainer.strategy.reduce(own, reduce_op="sum")
    return total


def _shared(module: ElasticCalibration, n_windows: int) -> bool:
    """Whether so many windows are shared out, at least one to each process."""
    return n_windows >= module.trainer.world_size


def everywhere(value: T) -> list[T]:
    """The plain values that all processes of a run give, in the order of their ranks."""
    found = [value] * n_processes()
    if len(found) > 1:
        torch.distributed.all_gather_object(found, value)
    return found
