"""Binary coded slices: planes of +1 and -1 with a scale each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mobiq_lightning.packing import SCALE_DTYPE, PackedBinary, binary_prefixes, pack_planes
from mobiq_lightning.strategies.base import DEFAULT_SLICE_BITS
from mobiq_lightning.strategies.numbers import in_range
from mobiq_lightning.strategies.slices.binary_fit import fit_binary
from mobiq_lightning.strategies.slices.fixed_codes import FixedCodeSlices, follow
from mobiq_lightning.strategies.slices.ranges import round_as_stored


class BinaryCodedSlices(FixedCodeSlices):
    """Binary coding quantization, grown slice by slice (after AnyBCQ, arXiv 2510.10467).

    A weight read with p planes is ``bias + sum of scale_i * b_i`` with ``b_i`` of +1 or -1. The planes of the base slice
    start greedily, each the sign of what the planes before it leave over, with the mean of its size as scale; then codes
    and scales take turns: the nearest code of every weight, the scales and the bias of least squares. Every further slice
    is fitted in the same way to what is left over, with all coarser planes and scales frozen, and without a bias.

    The paper freezes the planes alone: every precision there has refined scales of its own, here a plane has one scale at
    all depths. That costs B scales per group instead of the sum of the depths, and accuracy above 4 bits: with slices of one
    bit, weights far from the mean are never reached, and the error falls slowly. Slices of two bits are better there.

    A factor of each scale, kept as its logarithm, and a shift of the bias in units of the first scale are learned. The
    codes stay as they were found: a gradient of the scales is then exact, and none goes through a rounding.

    Args:
        out_features: Rows of the weight, O.
        in_features: Columns of the weight, I; the last group may be shorter than `group_size`.
        slice_bits: Bits of each slice, coarsest first; any positive integers with a sum of at most 8.
        group_size: Columns that share scales and bias.
        rounds: How often codes and scales take turns in each slice.

    Example:
        ``slices: {class_path: BinaryCodedSlices, init_args: {slice_bits: [2, 2, 2, 2], group_size: 64, rounds: 8}}``
    """

    code = PackedBinary.code

    def __init__(
        self,
        out_features: int,
        in_features: int,
        slice_bits: Sequence[int] = DEFAULT_SLICE_BITS,
        group_size: int = 128,
        rounds: int = 8,
    ) -> None:
        super().__init__(out_features, in_features, slice_bits, group_size)
        in_range("rounds", rounds, 0, 1000)
        self.rounds = rounds
        self.log_scale = nn.Parameter(torch.zeros(self.depths[-1], *self.group_shape))
        self.bias_shift = nn.Parameter(torch.zeros(self.group_shape))

    def weight_at(self, weight: Tensor, n_slices: int) -> Tensor:
        """Gives the weight (O, I) float32 read with its first `n_slices` slices, differentiable in scales and bias."""
        return self._prefixes(weight, n_slices)[-1]

    def prefixes(self, weight: Tensor) -> Tensor:
        """Gives the weight read with 1, 2, ... S slices, (S, O, I) float32, differentiable in scales and bias."""
        return torch.stack(self._prefixes(weight, len(self.slice_bits)))

    @torch.no_grad()
    def pack(self, weight: Tensor) -> PackedBinary:
        """Packs the weight (O, I): one plane per bit, one bias per group, and one scale per group and plane."""
        codes, scales, bias = self._learned(weight)
        planes = tuple(pack_planes(codes, self.depths[-1]))
        values = tuple(value.to(SCALE_DTYPE) for value in (bias, *scales))
        return PackedBinary(planes, values, self.in_features, self.group_size, self.slice_bits)

    def find(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Finds codes (O, I) uint8, scales (O, G, B) of all B planes and bias (O, G) of some rows (O, I)."""
        return fit_binary(weight, self.slice_bits, self.group_size, self.rounds)

    def _prefixes(self, weight: Tensor, n_slices: int) -> list[Tensor]:
        """The weight (O, I) read with 1, 2, ... slices."""
        codes, scales, bias = self._learned(weight)
        depths = self.depths[:n_slices]
        leading = codes >> (self.depths[-1] - depths[-1])
        reads = list(binary_prefixes(leading, scales[: depths[-1]], bias, self.group_size))
        return [follow(reads[depth - 1], weight) for depth in depths]

    def _learned(self, weight: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Codes (O, I), scales (O, G) of each plane, and bias (O, G), as stored."""
        codes, scales, bias = self.found(weight)
        learned = scales.movedim(-1, 0) * self.log_scale.exp()
        shifted = bias + self.bias_shift * scales[..., 0]
        return codes, [round_as_stored(scale) for scale in learned], round_as_stored(shifted)
