"""How sliced weights are stored: bit planes, and the values that turn their codes into weights.

A weight matrix (O, I) is stored as ONE code of B bits per weight. Plane p holds bit p of every code, most significant
first, so the first p planes are a valid p-bit weight: reading fewer planes truncates the code.

Here is the nested code, which has one scale and one bias per group and is the only one that the kernels read; the others
are in `codes`. For a group with range ``[lo, hi]`` the weight read at depth p is the middle of the code's cell::

    bias + scale * ((C >> (B - p)) + 1/2) / 2^p - 1/2),      scale = hi - lo,   bias = (hi + lo) / 2

Both are kept in bfloat16. A bfloat16 times a 9-bit number is exact in float32, so every implementation of this formula
in float32, with or without fused multiply-add, gives the same bits.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

QUANT_METHOD = "mobiq"
FORMAT_VERSION = 2
"""The newest that this package reads, of the names and the meaning of the saved tensors. A checkpoint has the version of its
code (`PackedWeight.format_version`), so that what older packages can read, they do."""

SCALE_DTYPE = torch.bfloat16
WHOLE_ROW = 2**16
"""A group size that no row exceeds: one group per row."""
_BIT_WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)
_OF_PLANE = re.compile(r"(?:^|\.)(?:plane|slice_[a-z]+)_(\d)$")


def depths_of(slice_bits: tuple[int, ...]) -> tuple[int, ...]:
    """Bits read by the first 1, 2, ... slices: ``(2, 1, 1) -> (2, 3, 4)``."""
    return tuple(accumulate(slice_bits))


def n_groups(in_features: int, group_size: int) -> int:
    """Groups along one row; the last one may be shorter than `group_size`."""
    return -(-in_features // group_size)


def plane_of(name: str) -> int | None:
    """The last plane without which a stored tensor is of no use, by its name: None if it belongs to all depths."""
    found = _OF_PLANE.search(name)
    return None if found is None else int(found.group(1))


def pack_planes(codes: Tensor, n_bits: int) -> Tensor:
    """Splits codes into bit planes.

    Args:
        codes: (O, I) uint8, each below ``2 ** n_bits``.
        n_bits: Stored bits B, 1 to 8.

    Returns:
        (B, O, ceil(I / 8)) uint8. Plane 0 is the most significant bit; within a byte the first column is the highest bit.
    """
    padded = F.pad(codes, (0, -codes.shape[1] % 8))
    weights = torch.tensor(_BIT_WEIGHTS, dtype=torch.uint8, device=codes.device)
    planes = [
        (((padded >> (n_bits - 1 - p)) & 1).unflatten(1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
        for p in range(n_bits)
    ]
    return torch.stack(planes)


def unpack_codes(planes: Tensor | list[Tensor], in_features: int) -> Tensor:
    """Reads the leading planes back into codes.

    Args:
        planes: (p, O, ceil(I / 8)) uint8 or a list of p planes, most significant first.
        in_features: I.

    Returns:
        (O, I) uint8 codes of p bits.
    """
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=planes[0].device)
    codes = torch.zeros_like(planes[0]).repeat_interleave(8, dim=1)
    for plane in planes:
        codes = (codes << 1) | ((plane.unsqueeze(-1) >> shifts) & 1).flatten(1)
    return codes[:, :in_features]


def dequantize(codes: Tensor, n_bits: int, scale: Tensor, bias: Tensor, group_size: int) -> Tensor:
    """Weights of `n_bits`-bit codes, the middle of each cell.

    Args:
        codes: (O, I) integer codes, or their float values, below ``2 ** n_bits``.
        n_bits: Bits that were read, p.
        scale: (O, G) width ``hi - lo`` of each group's range.
        bias: (O, G) centre of each group's range.
        group_size: Columns per group.

    Returns:
        (O, I) float32.
    """
    position = (codes.float() + 0.5) * 2.0**-n_bits - 0.5
    columns = codes.shape[1]
    return spread(bias, group_size, columns) + spread(scale, group_size, columns) * position


def spread(per_group: Tensor, group_size: int, columns: int) -> Tensor:
    """(O, G) values of groups as (O, columns) float32 values of columns."""
    return per_group.float().repeat_interleave(min(group_size, columns), dim=1)[:, :columns]


class PackedWeight(ABC):
    """A sliced weight as it is stored: planes, and the values of its code.

    Names of values that belong to some depths alone end in ``_p``, p being the last plane that they need: a part of a
    checkpoint without that plane does without them.
    """

    code: ClassVar[str]
    """Name of the code in config.json."""
    format_version: ClassVar[int]
    """Of checkpoints that hold it."""

    planes: tuple[Tensor, ...]
    in_features: int
    group_size: int
    slice_bits: tuple[int, ...]

    @classmethod
    @abstractmethod
    def value_shapes(
        cls, out_features: int, in_features: int, group_size: int, slice_bits: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the values, bfloat16, that belong to the planes of `slice_bits`."""

    @classmethod
    @abstractmethod
    def of(
        cls,
        planes: tuple[Tensor, ...],
        values: Sequence[Tensor],
        in_features: int,
        group_size: int,
        slice_bits: tuple[int, ...],
    ) -> PackedWeight:
        """A weight of planes and of values in the order of `value_shapes`."""

    @property
    @abstractmethod
    def values(self) -> tuple[Tensor, ...]:
        """The values in the order of `value_shapes`."""

    @abstractmethod
    def weight_at(self, n_bits: int) -> Tensor:
        """The weight read to a depth of `n_bits`, (O, I) float32.

        Raises:
            ValueError: If that depth cannot be read.
        """

    @property
    def out_features(self) -> int:
        """O."""
        return self.planes[0].shape[0]

    @property
    def n_weights(self) -> int:
        """Weights of the matrix, O x I."""
        return self.out_features * self.in_features

    @property
    def overhead_bits(self) -> float:
        """Bits per weight spent on values."""
        return sum(value.numel() for value in self.values) * 16 / self.n_weights

    @property
    def named_values(self) -> dict[str, Tensor]:
        """The values by the names under which they are stored."""
        names = self.value_shapes(self.out_features, self.in_features, self.group_size, self.slice_bits)
        return dict(zip(names, self.values, strict=True))


@dataclass(frozen=True)
class PackedSlices(PackedWeight):
    """A weight in the nested code.

    Args:
        planes: B tensors (O, ceil(I / 8)) uint8, most significant bit first.
        scale: (O, G) bfloat16.
        bias: (O, G) bfloat16.
        in_features: I.
        group_size: Columns per group; the last group may be shorter.
        slice_bits: Bits of each slice; they add up to at least the number of planes.
    """

    code: ClassVar[str] = "nested"
    format_version: ClassVar[int] = 1

    planes: tuple[Tensor, ...]
    scale: Tensor
    bias: Tensor
    in_features: int
    group_size: int
    slice_bits: tuple[int, ...]

    @classmethod
    def value_shapes(
        cls, out_features: int, in_features: int, group_size: int, slice_bits: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """See `PackedWeight.value_shapes`."""
        return dict.fromkeys(("slice_scale", "slice_bias"), (out_features, n_groups(in_features, group_size)))

    @classmethod
    def of(
        cls,
        planes: tuple[Tensor, ...],
        values: Sequence[Tensor],
        in_features: int,
        group_size: int,
        slice_bits: tuple[int, ...],
    ) -> PackedSlices:
        """See `PackedWeight.of`."""
        scale, bias = values
        return cls(planes, scale, bias, in_features, group_size, slice_bits)

    @property
    def values(self) -> tuple[Tensor, ...]:
        """Scale and bias."""
        return self.scale, self.bias

    def weight_at(self, n_bits: int) -> Tensor:
        """The weight read to a depth of `n_bits`, (O, I) float32."""
        if not 1 <= n_bits <= len(self.planes):
            raise ValueError(f"n_bits ({n_bits}) must be between 1 and the stored planes ({len(self.planes)})")
        codes = unpack_codes(list(self.planes[:n_bits]), self.in_features)
        return dequantize(codes, n_bits, self.scale, self.bias, self.group_size)
