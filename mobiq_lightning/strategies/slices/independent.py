"""Residual slices with a range each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mobiq_lightning.packing import SCALE_DTYPE, PackedResiduals, pack_planes
from mobiq_lightning.strategies.base import DEFAULT_SLICE_BITS
from mobiq_lightning.strategies.slices.grouped import GroupedSlices
from mobiq_lightning.strategies.slices.nested_code import NestedCode, cells, unit_position
from mobiq_lightning.strategies.slices.ranges import learned_range


class IndependentResidualSlices(GroupedSlices):
    """Residual quantization: every slice rounds what the coarser ones left over, within a range of its own.

    It follows AutoRound, but the rounding itself is not learned. The residual of a group, given the slices before as
    they are at present, has a smallest and a largest value; between them lie ``2^b`` equal cells, b being the bits of
    the slice. The ends are learned per slice, as factors of the half-width. Later slices still reach what the base
    clips, since their ranges grow with it; the price is a scale and a bias per group and slice instead of per group.

    Args:
        out_features: Rows of the weight, O.
        in_features: Columns of the weight, I; the last group may be shorter than `group_size`.
        slice_bits: Bits of each slice, coarsest first; any positive integers with a sum of at most 8.
        group_size: Columns that share a range in each slice.

    Example:
        ``slices: {class_path: IndependentResidualSlices, init_args: {slice_bits: [2, 2, 2, 2], group_size: 64}}``
    """

    code = PackedResiduals.code

    def __init__(
        self,
        out_features: int,
        in_features: int,
        slice_bits: Sequence[int] = DEFAULT_SLICE_BITS,
        group_size: int = 128,
    ) -> None:
        super().__init__(out_features, in_features, slice_bits, group_size)
        shape = (len(self.slice_bits), *self.group_shape)
        self.low_clip = nn.Parameter(torch.zeros(shape))
        self.high_clip = nn.Parameter(torch.zeros(shape))

    def weight_at(self, weight: Tensor, n_slices: int) -> Tensor:
        """Gives the weight (O, I) float32 read with its first `n_slices` slices, differentiable in the ranges."""
        *_, read = self._prefixes(weight, n_slices)
        return read

    def prefixes(self, weight: Tensor) -> Tensor:
        """Gives the weight read with 1, 2, ... S slices, (S, O, I) float32, differentiable in the ranges."""
        return torch.stack(list(self._prefixes(weight, len(self.slice_bits))))

    @torch.no_grad()
    def pack(self, weight: Tensor) -> PackedResiduals:
        """Packs the weight (O, I): one plane per bit, and one scale and one bias per group and slice."""
        codes = torch.zeros_like(weight, dtype=torch.uint8)
        values: list[Tensor] = []
        residual = weight.float()
        for number, read in enumerate(self._prefixes(weight, len(self.slice_bits))):
            scale, bias = self._range(residual, number)
            bits = self.slice_bits[number]
            own = cells(unit_position(residual, scale, bias, self.group_size), bits).to(torch.uint8)
            codes = (codes << bits) | own
            values += [scale.to(SCALE_DTYPE), bias.to(SCALE_DTYPE)]
            residual = weight.float() - read
        planes = tuple(pack_planes(codes, self.depths[-1]))
        return PackedResiduals(planes, tuple(values), self.in_features, self.group_size, self.slice_bits)

    @torch.no_grad()
    def bound_clipping(self) -> None:
        """Narrows ranges that are wider than the weights of their group to those weights, in place."""
        self.low_clip.clamp_(max=0.0)
        self.high_clip.clamp_(max=0.0)

    def _prefixes(self, weight: Tensor, n_slices: int) -> Iterator[Tensor]:
        """The weight (O, I) read with 1, 2, ... slices."""
        residual, read = weight.float(), None
        for number, bits in enumerate(self.slice_bits[:n_slices]):
            scale, bias = self._range(residual, number)
            own: Tensor = NestedCode.apply(residual, scale, bias, self.group_size, (bits,))[0]  # type: ignore[no-untyped-call]
            read = own if read is None else read + own
            yield read
            residual = weight.float() - read

    def _range(self, residual: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Width and centre (O, G) of the ranges of slice `number`."""
        return learned_range(residual.detach(), self.low_clip[number], self.high_clip[number], self.group_size)
