"""The codes beside the nested one of `packing`: the same bit planes, other ways from codes to weights.

They serve comparisons. The Triton kernels do not read them, so that models with them run on the reference.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

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
from mobiq_lightning.packing.tensor_names import value_name


class PackedValues(PackedWeight):
    """A weight with any number of value tensors, readable at the depths of its slices and at no other.

    It has as many planes as its `slice_bits` add up to.
    """

    def weight_at(self, n_bits: int) -> Tensor:
        """Gives the weight read to a depth of `n_bits`, which whole slices must reach: (O, I) float32.

        Raises:
            ValueError: If no number of slices has `n_bits` bits.
        """
        depths = depths_of(self.slice_bits)
        if n_bits not in depths:
            raise ValueError(f"n_bits ({n_bits}) is no depth of the stored slices; depths are {list(depths)}")
        return self._read(unpack_codes(list(self.planes[:n_bits]), self.in_features), depths.index(n_bits) + 1)

    @abstractmethod
    def _read(self, codes: Tensor, n_slices: int) -> Tensor:
        """Weights (O, I) float32 of the codes (O, I) uint8 of the first `n_slices` slices."""


class PackedResiduals(PackedValues):
    """A weight whose slices have a scale and a bias of their own, (O, G) each.

    Values are stored slice by slice: scale, bias, scale, bias, ... A slice of b bits with code c adds
    ``bias + scale * ((c + 1/2) / 2^b - 1/2)``.
    """

    code = "per_slice"

    @classmethod
    def value_shapes(
        cls, out_features: int, in_features: int, group_size: int, slice_bits: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a scale and a bias for each slice, (O, G) each."""
        shape = (out_features, n_groups(in_features, group_size))
        lasts = [depth - 1 for depth in depths_of(slice_bits)]
        return {name: shape for last in lasts for name in (value_name("scale", last), value_name("bias", last))}

    def _read(self, codes: Tensor, n_slices: int) -> Tensor:
        depths = depths_of(self.slice_bits)[:n_slices]
        total: Tensor | None = None
        for bits, depth, scale, bias in zip(self.slice_bits, depths, self.values[::2], self.values[1::2], strict=False):
            own = (codes >> (depths[-1] - depth)) & (2**bits - 1)
            read = dequantize(own, bits, scale, bias, self.group_size)
            total = read if total is None else total + read
        assert total is not None
        return total


class PackedBinary(PackedValues):
    """A weight with a scale per plane and one bias, (O, G) each: ``bias + sum of scale_p * (+1 or -1)``."""

    code = "per_plane"

    @classmethod
    def value_shapes(
        cls, out_features: int, in_features: int, group_size: int, slice_bits: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the bias and of a scale for each plane, (O, G) each."""
        names = [value_name("bias"), *(value_name("scale", plane) for plane in range(sum(slice_bits)))]
        return dict.fromkeys(names, (out_features, n_groups(in_features, group_size)))

    def _read(self, codes: Tensor, n_slices: int) -> Tensor:
        depth = depths_of(self.slice_bits)[n_slices - 1]
        *_, read = binary_prefixes(codes, self.values[1 : depth + 1], self.values[0], self.group_size)
        return read


class PackedTables(PackedValues):
    """A weight with a table of values (O, G, 2^p) for each depth p; the code read to depth p is the index."""

    code = "codebook"

    @classmethod
    def value_shapes(
        cls, out_features: int, in_features: int, group_size: int, slice_bits: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a table for each depth p of the slices, (O, G, 2^p)."""
        groups = n_groups(in_features, group_size)
        return {value_name("table", depth - 1): (out_features, groups, 2**depth) for depth in depths_of(slice_bits)}

    def _read(self, codes: Tensor, n_slices: int) -> Tensor:
        return look_up(codes, self.values[n_slices - 1], self.group_size)


CODES: dict[str, type[PackedWeight]] = {
    kind.code: kind for kind in (PackedSlices, PackedResiduals, PackedBinary, PackedTables)
}
"""Class of the stored weight for each code, by the code's name in config.json."""


def binary_prefixes(codes: Tensor, scales: Sequence[Tensor], bias: Tensor, group_size: int) -> Iterator[Tensor]:
    """Yields the weights (O, I) float32 of a binary code read with 1, 2, ... planes.

    Args:
        codes: (O, I) uint8 codes of as many bits as there are scales; a set bit is +1, any other -1.
        scales: (O, G) scales of each plane.
        bias: (O, G) bias that all planes share.
        group_size: Columns per group.
    """
    columns = codes.shape[1]
    read = spread(bias, group_size, columns)
    for plane, scale in enumerate(scales):
        sign = ((codes >> (len(scales) - 1 - plane)) & 1).float().mul_(2).sub_(1)
        read = read + spread(scale, group_size, columns) * sign
        yield read


def look_up(codes: Tensor, table: Tensor, group_size: int) -> Tensor:
    """Looks up the weights (O, I) float32 of codes (O, I), indices into the tables (O, G, K) of their groups."""
    group = torch.arange(codes.shape[1], device=codes.device) // group_size
    return table.float().flatten(1).gather(1, codes.long() + group * table.shape[2])
