"""MoBiSlice: residual slices of one nested, floor-aligned code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mobiq_lightning.packing import SCALE_DTYPE, PackedSlices, pack_planes
from mobiq_lightning.strategies.base import DEFAULT_SLICE_BITS
from mobiq_lightning.strategies.slices.grouped import GroupedSlices
from mobiq_lightning.strategies.slices.nested_code import NestedCode, cells, unit_position
from mobiq_lightning.strategies.slices.ranges import extremes, learned_range, range_between
from mobiq_lightning.tensor_memo import TensorMemo


class ResidualSlices(GroupedSlices):
    """Nested codes with one learned range per group (MoBiSlice, arXiv 2602.20191, section 3).

    Each group of `group_size` columns has a range ``[lo, hi]``. The weight's code is its cell among ``2^B`` equal cells
    of the range, B being the bits of all slices; its first p bits are its cell among ``2^p``. A slice of b bits
    therefore holds the residual of the slices before it, in steps ``2^b`` times as fine, and leaving it out truncates
    the code. The ends of the range start at the group's smallest and largest weight and are learned, each on its own,
    as a factor of the half-width (learnable clipping, OmniQuant, arXiv 2308.13137; there the factor cannot exceed 1,
    here it may widen the range, to at most twice, since the outermost reconstruction points lie half a cell inside of
    it).

    Args:
        out_features: Rows of the weight, O.
        in_features: Columns of the weight, I; the last group may be shorter than `group_size`.
        slice_bits: Bits of each slice, coarsest first; any positive integers with a sum of at most 8.
        group_size: Columns that share one range.

    Example:
        ``slices: {class_path: ResidualSlices, init_args: {slice_bits: [2, 1, 1, 2, 2], group_size: 64}}``
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        slice_bits: Sequence[int] = DEFAULT_SLICE_BITS,
        group_size: int = 128,
    ) -> None:
        super().__init__(out_features, in_features, slice_bits, group_size)
        self.low_clip = nn.Parameter(torch.zeros(self.group_shape))
        self.high_clip = nn.Parameter(torch.zeros(self.group_shape))
        self._extremes = TensorMemo[tuple[Tensor, Tensor]]()

    def weight_at(self, weight: Tensor, n_slices: int) -> Tensor:
        """Gives the weight (O, I) float32 read with its first `n_slices` slices, differentiable in the ranges."""
        scale, bias = self._range(weight)
        depths = (self.depths[n_slices - 1],)
        return NestedCode.apply(weight, scale, bias, self.group_size, depths)[0]  # type: ignore[no-untyped-call,no-any-return]

    def prefixes(self, weight: Tensor) -> Tensor:
        """Gives the weight read with 1, 2, ... S slices, (S, O, I) float32, differentiable in the ranges."""
        scale, bias = self._range(weight)
        return NestedCode.apply(weight, scale, bias, self.group_size, self.depths)  # type: ignore[no-untyped-call,no-any-return]

    @torch.no_grad()
    def pack(self, weight: Tensor) -> PackedSlices:
        """Packs the weight (O, I): one plane per bit; scale and bias of a group are width and centre of its range."""
        scale, bias = self._range(weight)
        n_bits = self.depths[-1]
        codes = self._code(weight, scale, bias, n_bits).to(torch.uint8)
        return PackedSlices(
            planes=tuple(pack_planes(codes, n_bits)),
            values=(scale.to(SCALE_DTYPE), bias.to(SCALE_DTYPE)),
            in_features=self.in_features,
            group_size=self.group_size,
            slice_bits=self.slice_bits,
        )

    @torch.no_grad()
    def bound_clipping(self) -> None:
        """Narrows ranges that are wider than the weights of their group to those weights, in place."""
        self.low_clip.clamp_(max=0.0)
        self.high_clip.clamp_(max=0.0)

    def _code(self, weight: Tensor, scale: Tensor, bias: Tensor, depth: int) -> Tensor:
        """Codes (O, I) of `depth` bits, as floats, in ranges of widths `scale` and centres `bias` (O, G)."""
        return cells(unit_position(weight, scale, bias, self.group_size), depth)

    def _range(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Width and centre (O, G) of the groups' ranges."""
        if weight.requires_grad or not torch.is_grad_enabled():
            return learned_range(weight, self.low_clip, self.high_clip, self.group_size)
        with torch.no_grad():  # in training the weight is the same in every step
            low, high = self._extremes.get(weight, lambda: extremes(weight.float(), self.group_size))
        return range_between(low, high, self.low_clip, self.high_clip)

    def forget(self) -> None:
        """Drops the smallest and largest weights of groups, which are kept while the block is trained."""
        self._extremes.forget()
