"""How sliced weights are stored: bit planes, and the values that turn their codes into weights.

A weight matrix (O, I) is stored as ONE code of B bits per weight. Plane p holds bit p of every code, most significant
first, so the first p planes are a valid p-bit weight: reading fewer planes truncates the code.

Here is the nested code, which has one scale and one bias per group and is the only one that the kernels read; the others
are in `other_codes`. For a group with range ``[lo, hi]`` the weight read at depth p is the middle of the code's cell::

    bias + scale * (((C >> (B - p)) + 1/2) / 2^p - 1/2),      scale = hi - lo,   bias = (hi + lo) / 2

Both are kept in bfloat16. A bfloat16 times a 9-bit number is exact in float32, so every implementation of this formula
in float32, with or without fused multiply-add, gives the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.packing.tensor_names import plane_name, value_name

SCALE_DTYPE = torch.bfloat16
WHOLE_ROW = 2**16
"""Group size that no row exceeds, for one group per row."""
_BIT_WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)


def depths_of(slice_bits: tuple[int, ...]) -> tuple[int, ...]:
    """Gives the bits read by the first 1, 2, ... slices: ``(2, 1, 1) -> (2, 3, 4)``."""
    return tuple(accumulate(slice_bits))


def n_groups(in_features: int, group_size: int) -> int:
    """Number of groups along one row, G; the last one may be shorter than `group_size`."""
    return -(-in_features // group_size)


def pack_planes(codes: Tensor, n_bits: int) -> Tensor:
    """Splits codes into bit planes.

    Args:
        codes: (O, I) uint8, each below ``2 ** n_bits``.
        n_bits: Number of stored bits B, 1 to 8.

    Returns:
        (B, O, ceil(I / 8)) uint8 planes. Plane 0 is the most significant bit; within a byte the first column is the
        highest bit.
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
        in_features: Columns of the weight, I.

    Returns:
        (O, I) uint8 codes of p bits.

    Raises:
        ValueError: If there is no plane.
    """
    if len(planes) == 0:
        raise ValueError("no bit planes were given to unpack; a code is read from at least one, the most significant")
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=planes[0].device)
    codes = torch.zeros_like(planes[0]).repeat_interleave(8, dim=1)
    for plane in planes:
        codes = (codes << 1) | ((plane.unsqueeze(-1) >> shifts) & 1).flatten(1)
    return codes[:, :in_features]


def dequantize(codes: Tensor, n_bits: int, scale: Tensor, bias: Tensor, group_size: int) -> Tensor:
    """Computes the weights of codes of `n_bits` bits: the middle of each code's cell in the range of its group.

    Args:
        codes: (O, I) integer codes, or their float values, below ``2 ** n_bits``.
        n_bits: Number of bits that were read, p.
        scale: (O, G) width ``hi - lo`` of each group's range.
        bias: (O, G) centre of each group's range.
        group_size: Columns per group.

    Returns:
        (O, I) float32 weights.
    """
    columns = codes.shape[1]
    read = in_groups(middles(codes, n_bits), group_size) * by_group(scale, group_size, columns)
    return read.add_(by_group(bias, group_size, columns)).flatten(1)


def middles(codes: Tensor, n_bits: int) -> Tensor:
    """Middles (O, I) float32 of the cells of codes (O, I) in a range from -1/2 to 1/2, exactly."""
    return (codes.float() * 2.0**-n_bits).add_(2.0 ** -(n_bits + 1) - 0.5)


def in_groups(per_weight: Tensor, group_size: int) -> Tensor:
    """A view of values of weights (O, I) that values from `by_group` fit: (O, G, I / G), or (O, 1, I) if a group is shorter."""
    columns = per_weight.shape[1]
    size = min(group_size, columns)
    return per_weight.unflatten(1, (-1, size)) if columns % size == 0 else per_weight.unsqueeze(1)


def by_group(per_group: Tensor, group_size: int, columns: int) -> Tensor:
    """Values of groups (O, G) as float32 beside those of weights from `in_groups`: (O, G, 1), or (O, 1, I) if a group is shorter.

    Repeating them for every column would write as many numbers as there are weights.
    """
    if columns % min(group_size, columns) == 0:
        return per_group.float().unsqueeze(-1)
    return spread(per_group, group_size, columns).unsqueeze(1)


def spread(per_group: Tensor, group_size: int, columns: int) -> Tensor:
    """Repeats values of groups (O, G) for every column of their group: (O, columns) float32."""
    return per_group.float().repeat_interleave(min(group_size, columns), dim=1)[:, :columns]


@dataclass(frozen=True)
class PackedWeight(ABC):
    """A sliced weight as it is stored: bit planes, and the values with which its code turns them into weights.

    Names of values that belong to some depths alone end in ``_p``, p being the last plane that they need: a part of a
    checkpoint without that plane does without them.

    Args:
        planes: Bit planes, (O, ceil(I / 8)) uint8 each, most significant bit first.
        values: Values of the code, bfloat16, in the order of `value_shapes`.
        in_features: Columns of the weight, I.
        group_size: Columns per group; the last group may be shorter.
        slice_bits: Bits of each slice; they add up to at least the number of planes.
    """

    code: ClassVar[str]
    """Name of the code in config.json."""

    planes: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    in_features: int
    group_size: int
    slice_bits: tuple[int, ...]

    @classmethod
    @abstractmethod
    def value_shapes(
        cls, out_features: int, in_features: int, group_size: int, slice_bits: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the values, bfloat16, that belong to the planes of `slice_bits`."""

    @abstractmethod
    def weight_at(self, n_bits: int) -> Tensor:
        """Gives the weight read to a depth of `n_bits`, (O, I) float32.

        Raises:
            ValueError: If that depth cannot be read.
        """

    @property
    def out_features(self) -> int:
        """Rows of the weight, O."""
        return self.planes[0].shape[0]

    @property
    def n_weights(self) -> int:
        """Number of weights of the matrix, O x I."""
        return self.out_features * self.in_features

    @property
    def overhead_bits(self) -> float:
        """Bits per weight spent on the values of the code, such as scales and biases."""
        return sum(value.numel() for value in self.values) * 16 / self.n_weights

    @property
    def named_values(self) -> dict[str, Tensor]:
        """Values of the code, by the names under which they are stored."""
        names = self.value_shapes(self.out_features, self.in_features, self.group_size, self.slice_bits)
        return dict(zip(names, self.values, strict=True))

    @property
    def named_tensors(self) -> dict[str, Tensor]:
        """Bit planes, then values of the code, by the names under which they are stored."""
        return {plane_name(number): plane for number, plane in enumerate(self.planes)} | self.named_values


class PackedSlices(PackedWeight):
    """A weight in the nested code: its values are the scale and the bias of each group, (O, G) bfloat16 each."""

    code: ClassVar[str] = "nested"

    @classmethod
    def value_shapes(
        cls, out_features: int, in_features: int, group_size: int, slice_bits: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the scale and of the bias, (O, G) each."""
        shape = (out_features, n_groups(in_features, group_size))
        return dict.fromkeys((value_name("scale"), value_name("bias")), shape)

    @property
    def scale(self) -> Tensor:
        """Width ``hi - lo`` of the range of each group, (O, G) bfloat16."""
        return self.values[0]

    @property
    def bias(self) -> Tensor:
        """Centre ``(hi + lo) / 2`` of the range of each group, (O, G) bfloat16."""
        return self.values[1]

    def weight_at(self, n_bits: int) -> Tensor:
        """Gives the weight read to a depth of `n_bits`, any number of stored planes: (O, I) float32.

        Raises:
            ValueError: If there are fewer planes, or `n_bits` is below 1.
        """
        if not 1 <= n_bits <= len(self.planes):
            raise ValueError(f"n_bits ({n_bits}) must be between 1 and the stored planes ({len(self.planes)})")
        codes = unpack_codes(list(self.planes[:n_bits]), self.in_features)
        return dequantize(codes, n_bits, self.scale, self.bias, self.group_size)
