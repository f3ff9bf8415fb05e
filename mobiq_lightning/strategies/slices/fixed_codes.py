"""Schemes whose codes are found once, from the weight alone, and whose values are learned."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mobiq_lightning.strategies.slices.grouped import GroupedSlices

CHUNK = 2**22
"""Weights whose codes are found at a time: what that needs is several times as large as the weights."""


class _Found(NamedTuple):
    """What was found of a weight, and how to tell that it still is that weight."""

    weight: weakref.ref[Tensor]
    state: tuple[int, int, torch.device]
    tensors: tuple[Tensor, ...]


class FixedCodeSlices(GroupedSlices, ABC):
    """Codes and initial values are a function of the weight, found at the first call and kept until `forget`.

    They are no part of the state: whoever resumes or packs finds them again, the same on the same device. A weight that is
    another tensor, or was changed, has its codes found anew, so that a transform that trains gets codes for what it makes,
    at the price of the search in each call. Towards the weight the gradient is that of no rounding.
    """

    _found: _Found | None = None

    @abstractmethod
    def find(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Codes and initial values of some rows (O, I) float32: tensors whose first dimension is O."""

    def found(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What `find` gives for all rows of a weight (O, I)."""
        version = -1 if weight.is_inference() else weight._version  # inference tensors do not count their changes
        state = (weight.data_ptr(), version, weight.device)
        kept = self._found
        if kept is None or kept.weight() is not weight or kept.state != state or version < 0:
            # Not inference tensors, and in full precision: what is kept takes part in training steps to come.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                rows = max(1, CHUNK // weight.shape[1])
                parts = [self.find(part.float()) for part in weight.detach().split(rows)]
                tensors = tuple(torch.cat(tensor) for tensor in zip(*parts, strict=True))
            self._found = kept = _Found(weakref.ref(weight), state, tensors)
        return kept.tensors

    def forget(self) -> None:
        """See `SliceScheme.forget`."""
        self._found = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what was found, which is tied to a tensor of this process."""
        return {**self.__dict__, "_found": None}


def follow(read: Tensor, weight: Tensor) -> Tensor:
    """What was read, (..., O, I), with the gradient of the weight (O, I) itself, if that has one."""
    return read + (weight.float() - weight.float().detach()) if weight.requires_grad else read


def in_groups(values: Tensor, group_size: int, fill: float) -> tuple[Tensor, Tensor]:
    """Values by group, and how many each group has.

    Args:
        values: (O, I).
        group_size: Columns per group.
        fill: What fills up the last group.

    Returns:
        (O, G, N) and (G,) int64, N being the size of all groups but perhaps the last.
    """
    columns = values.shape[1]
    size = min(group_size, columns)
    padded = torch.nn.functional.pad(values, (0, -columns % size), value=fill).unflatten(1, (-1, size))
    counts = torch.full(padded.shape[1:2], size, device=values.device)
    counts[-1] = columns - size * (padded.shape[1] - 1)
    return padded, counts
