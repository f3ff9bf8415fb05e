"""Round to nearest, without calibration: the least that a peer has to beat."""

from __future__ import annotations

from typing import Any

import torch

from ..peer import Peer, Task, set_weight


@torch.no_grad()
def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Asymmetric grid of the group's smallest and largest weight, with an integer zero.

    Args:
        weight: (O, I), I a multiple of `group_size`.
        bits: Per weight.
        group_size: Columns that share one grid.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(min=1e-9)
    zero = (-low / scale).round().clamp(0, top)
    rounded: torch.Tensor = (((groups / scale).round() + zero).clamp(0, top) - zero).mul(scale).flatten(1)
    return rounded


def run(task: Task) -> Any:
    for _, linear in task.linears():
        set_weight(linear, round_to_nearest(linear.weight, task.bits, task.group_size))
    return task.model


PEERS = [Peer("RTN", run, None, "integer zero", calibrated=False)]
