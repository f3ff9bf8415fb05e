"""What the slice schemes have in common: weights that are next to each other in a row share what is learned."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence

from mobiq_lightning.packing import n_groups
from mobiq_lightning.strategies.base import SliceScheme
from mobiq_lightning.strategies.numbers import in_range

MOST_COLUMNS = 2**31 - 1
"""Largest group; above the width of a layer, a whole row is one group."""


class GroupedSlices(SliceScheme, ABC):
    """A scheme that treats each group of columns of each row by itself.

    Args:
        out_features: Rows of the weight, O.
        in_features: Columns of the weight, I; the last group may be shorter than `group_size`.
        slice_bits: Bits of each slice, coarsest first; any positive integers with a sum of at most 8.
        group_size: Columns per group; `packing.WHOLE_ROW` or any number above I for one group per row.
    """

    def __init__(self, out_features: int, in_features: int, slice_bits: Sequence[int], group_size: int) -> None:
        super().__init__(out_features, in_features, slice_bits)
        in_range("group_size", group_size, 1, MOST_COLUMNS)
        self.group_size = group_size

    @property
    def group_shape(self) -> tuple[int, int]:
        """Shape (O, G) of tensors with one entry per group: rows of the weight, groups along a row."""
        return self.out_features, n_groups(self.in_features, self.group_size)

    def extra_repr(self) -> str:
        """Sizes that `print(module)` shows of the scheme."""
        return f"{self.out_features}x{self.in_features}, {list(self.slice_bits)} bits, groups of {self.group_size}"
