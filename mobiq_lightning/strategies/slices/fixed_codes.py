"""Schemes whose codes are found once, from the weight alone, and whose values are learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mobiq_lightning.strategies.slices.grouped import GroupedSlices
from mobiq_lightning.tensor_memo import TensorMemo

CHUNK = 2**22
"""Weights whose codes are found at a time: what that needs is several times as large as the weights."""


class FixedCodeSlices(GroupedSlices, ABC):
    """A scheme whose codes and initial values depend on the weight alone, found at the first call, kept until `forget`.

    They are not saved: whoever resumes or packs finds them again, the same on the same device. Codes are found anew for
    a weight that is another tensor or was changed, so that a transform that trains gets codes for what it makes, at the
    price of a search in each call. The gradient for the weight is that of no rounding.

    Args:
        out_features: Rows of the weight, O.
        in_features: Columns of the weight, I; the last group may be shorter than `group_size`.
        slice_bits: Bits of each slice, coarsest first; any positive integers with a sum of at most 8.
        group_size: Columns per group; `packing.WHOLE_ROW` or any number above I for one group per row.
    """

    def __init__(self, out_features: int, in_features: int, slice_bits: Sequence[int], group_size: int) -> None:
        super().__init__(out_features, in_features, slice_bits, group_size)
        # Weights of inference mode may change unnoticed, and wrong codes would be kept for the whole calibration.
        self._found = TensorMemo[tuple[Tensor, ...]](trust_uncounted=False)

    @abstractmethod
    def find(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Finds codes and initial values of some rows (O, I) float32 of a weight, as tensors with O rows."""

    def found(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Codes and initial values of all rows of a weight (O, I), kept from the last call for the same weight."""
        return self._found.get(weight, lambda: self._find_all(weight))

    def forget(self) -> None:
        """Drops the codes that were found, which the next call finds again; called when a block is done."""
        self._found.forget()

    def _find_all(self, weight: Tensor) -> tuple[Tensor, ...]:
        # Not inference tensors, and in full precision: what is kept takes part in training steps to come.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            rows = max(1, CHUNK // weight.shape[1])
            parts = [self.find(part.float()) for part in weight.detach().split(rows)]
            return tuple(torch.cat(tensor) for tensor in zip(*parts, strict=True))


def follow(read: Tensor, weight: Tensor) -> Tensor:
    """Gives what was read, (..., O, I), the gradient of the weight (O, I) itself, if that has one."""
    return read + (weight.float() - weight.float().detach()) if weight.requires_grad else read


def in_groups(values: Tensor, group_size: int, fill: float) -> tuple[Tensor, Tensor]:
    """Arranges values by group, and counts how many each group has.

    Args:
        values: (O, I) values, such as a weight.
        group_size: Columns per group.
        fill: Value that fills up the last group.

    Returns:
        Values (O, G, N) and counts (G,) int64, N being the size of all groups but perhaps the last.
    """
    columns = values.shape[1]
    size = min(group_size, columns)
    padded = torch.nn.functional.pad(values, (0, -columns % size), value=fill).unflatten(1, (-1, size))
    counts = torch.full(padded.shape[1:2], size, device=values.device)
    counts[-1] = columns - size * (padded.shape[1] - 1)
    return padded, counts
