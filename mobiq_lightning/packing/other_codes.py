"""The codes beside the nested one of `packing`: the same bit planes, other ways from codes to weights.

They serve comparisons. The Triton kernels do not read them, so that models with them run on the reference.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mobiq_lightning.packing.nested import (
    PackedSlices,
    PackedWeight,
    depths_of,
    dequantize,
    n_groups,
    spread,
    unpack_codes,
)


@dataclass(frozen=True)
class PackedValues(PackedWeight):
    """A weight with any number of value tensors, readable at the depths of its slices.

    Args:
        planes: Tensors (O, ceil(I / 8)) uint8, most significant bit first; as many as `slice_bits` add up to.
        stored: The values, bfloat16, in the order of `value_shapes`.
        in_features: I.
        group_size: Columns per group; the last group may be shorter.
        slice_bits: Bits of each slice.
    """

    format_version: ClassVar[int] = 2

    planes: tuple[Tensor, ...]
    stored: tuple[Tensor, ...]
    in_features: int
    group_size: int
    slice_bits: tuple[int, ...]

    @classmethod
    def of(
        cls,
        planes: tuple[Tensor, ...],
        values: Sequence[Tensor],
        in_features: int,
        group_size: int,
        slice_bits: tuple[int, ...],
    ) -> PackedValues:
        """See `PackedWeight.of`."""
        return cls(planes, tuple(values), in_features, group_size, slice_bits)

    @property
    def values(self) -> tuple[Tensor, ...]:
        """See `PackedWeight.values`."""
        return self.stored

    def weight_at(self, n_bits: int) -> Tensor:
        """See `PackedWeight.weight_at`."""
        depths = depths_of(self.slice_bits)
        if n_bits not in depths:
            raise ValueError(f"n_bits ({n_bits}) is no depth of the stored slices; depths are {list(depths)}")
        return self._read(unpack_codes(list(self.planes[:n_bits]), self.in_features), depths.index(n_bits) + 1)

    @abstractmethod
    def _read(self, codes: Tensor, n_slices: int) -> Tensor:
        """Weights (O, I) float32 of the codes (O, I) uint8 of the first `n_slices` slices."""


class PackedResiduals(PackedValues):
    """Slices with a scale and a bias of their own, (O, G) each; the values of the slices take turns.

    A slice of b bits with code c adds ``bias + scale * ((c + 1/2) / 2^b - 1/2)``.
    """

    code = "per_slice"

    @classmethod
    def value_shapes(
        cls, out_features: int, in_features: int, group_size: int, slice_bits: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """See `PackedWeight.value_shapes`."""
        shape = (out_features, n_groups(in_features, group_size))
        names = [f"slice_{kind}_{depth - 1}" for depth in depths_of(slice_bits) for kind in ("scale", "bias")]
        return dict.fromkeys(names, shape)

    def _read(self, codes: Tensor, n_slices: int) -> Tensor:
        depths = depths_of(self.slice_bits)[:n_slices]
        total: Tensor | None = None
        for bits, depth, scale, bias in zip(self.slice_bits, depths, self.stored[::2], self.stored[1::2], strict=False):
            own = (codes >> (depths[-1] - depth)) & (2**bits - 1)
            read = dequantize(own, bits, scale, bias, self.group_size)
            total = read if total is None else total + read
        assert total is not None
        return total


class PackedBinary(PackedValues):
    """Planes with a scale of their own, (O, G) each, and one bias for all: ``bias + sum of scale_p * (+1 or -1)``."""

    code = "per_plane"

    @classmethod
    def value_shapes(
        cls, out_features: int, in_features: int, group_size: int, slice_bits: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """See `PackedWeight.value_shapes`."""
        names = ["slice_bias", *(f"slice_scale_{plane}" for plane in range(sum(slice_bits)))]
        return dict.fromkeys(names, (out_features, n_groups(in_features, group_size)))

    def _read(self, codes: Tensor, n_slices: int) -> Tensor:
        depth = depths_of(self.slice_bits)[n_slices - 1]
        *_, read = binary_prefixes(codes, self.stored[1 : depth + 1], self.stored[0], self.group_size)
        return read


class PackedTables(PackedValues):
    """A table of values for each group and depth, (O, G, 2^p): the code read to depth p is the index."""

    code = "codebook"

    @classmethod
    def value_shapes(
        cls, out_features: int, in_features: int, group_size: int, slice_bits: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """See `PackedWeight.value_shapes`."""
        groups = n_groups(in_features, group_size)
        return {f"slice_table_{depth - 1}": (out_features, groups, 2**depth) for depth in depths_of(slice_bits)}

    def _read(self, codes: Tensor, n_slices: int) -> Tensor:
        return look_up(codes, self.stored[n_slices - 1], self.group_size)


CODES: dict[str, type[PackedWeight]] = {
    kind.code: kind for kind in (PackedSlices, PackedResiduals, PackedBinary, PackedTables)
}
"""By the name in config.json."""


def binary_prefixes(codes: Tensor, scales: Sequence[Tensor], bias: Tensor, group_size: int) -> Iterator[Tensor]:
    """Weights (O, I) float32 read with 1, 2, ... planes.

    Args:
        codes: (O, I) uint8 of as many bits as there are scales; a set bit is +1, another -1.
        scales: (O, G) of each plane.
        bias: (O, G).
        group_size: Columns per group.
    """
    columns = codes.shape[1]
    read = spread(bias, group_size, columns)
    for plane, scale in enumerate(scales):
        sign = ((codes >> (len(scales) - 1 - plane)) & 1).float().mul_(2).sub_(1)
        read = read + spread(scale, group_size, columns) * sign
        yield read


def look_up(codes: Tensor, table: Tensor, group_size: int) -> Tensor:
    """Weights (O, I) float32 of codes (O, I), indices into the tables (O, G, K) of their groups."""
    group = torch.arange(codes.shape[1], device=codes.device) // group_size
    return table.float().flatten(1).gather(1, codes.long() + group * table.shape[2])
