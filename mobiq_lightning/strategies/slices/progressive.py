"""Nested codes that are learned slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.packing import by_group, dequantize, in_groups
from mobiq_lightning.strategies.abilities import TrainableCodes
from mobiq_lightning.strategies.base import DEFAULT_SLICE_BITS
from mobiq_lightning.strategies.numbers import in_range
from mobiq_lightning.strategies.slices.nested_code import unit_position
from mobiq_lightning.strategies.slices.residual import ResidualSlices
from mobiq_lightning.strategies.slices.trained_code import CodeOfRows, TrainedCode, ends, refine

_INSIDE = 1e-4
"""Share of the range that a target keeps from the borders of its cell at first, so that rounding cannot cross one."""


class ProgressiveSlices(ResidualSlices, TrainableCodes):
    """The nested code of `ResidualSlices`, whose slices are trained one after the other, each for its own depth.

    Depths that are trained at once get in each other's way: to move a weight across a border of the 2-bit code for the
    sake of depth 2 costs every finer depth. Here the code is trained depth by depth. A slice has a target of its own,
    (O, I), that starts at the weight and is trained through the quantizer, straight through, at the depth that the
    slice reaches; when the next slice begins, the codes so far are frozen, and its target starts at the weight again,
    moved into the cell that the frozen code leaves it. So no depth is sacrificed to another, and what is stored stays
    one code with one range. Training weights through the quantizer, block by block: EfficientQAT, arXiv 2407.11062.

    Depths that are not trained yet, or never are, code the weight itself, moved into the cell of the code before.
    Without stages that train `codes` this scheme equals `ResidualSlices`.

    A weight outside of the cell that a trained code leaves it saturates: however many slices are read, it stays at the
    border of the cell. That is what codes trained for few bits cost at 6 and 8 bits. `max_saturation` bounds it: a code
    moves only where the weight is so near to the border of the cell that it moves to.

    Args:
        out_features: Rows of the weight, O.
        in_features: Columns of the weight, I; the last group may be shorter than `group_size`.
        slice_bits: Bits of each slice, coarsest first; any positive integers with a sum of at most 8.
        group_size: Columns that share one range.
        max_saturation: How far, in steps of the finest depth, training may leave a weight outside of the cell of its
            code; 0 or more. None for any distance.

    Example:
        ``slices: {class_path: ProgressiveSlices, init_args: {slice_bits: [2, 1, 1, 2, 2], group_size: 64}}``
    """

    target: nn.Parameter
    codes: Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        slice_bits: Sequence[int] = DEFAULT_SLICE_BITS,
        group_size: int = 128,
        max_saturation: float | None = None,
    ) -> None:
        super().__init__(out_features, in_features, slice_bits, group_size)
        if max_saturation is not None:
            in_range("max_saturation", max_saturation, 0, 2 ** self.depths[-1])
        self.max_saturation = max_saturation
        # Both are as large as the weight, so they exist only from when they are needed on, and the target no longer.
        self.target = nn.Parameter(torch.empty(0, 0))
        self.register_buffer("codes", torch.empty(0, 0, dtype=torch.uint8))
        # Plain numbers: of a tensor on a GPU, every read of the weights would wait for the device.
        self.bits_frozen = self.bits_trained = 0

    def code_parameters(self) -> list[nn.Parameter]:
        """The target (O, I) of the slice in training; it is empty before the first slice starts and after `freeze`."""
        return [self.target]

    def resized_tensors(self) -> list[str]:
        """Names of the trained target and of the frozen codes, which have a size only while they are needed."""
        return ["target", "codes"]

    @torch.no_grad()
    def start_slice(self, weight: Tensor, n_bits: int) -> bool:
        """Freezes the codes so far and starts the target of the slice that reaches `n_bits`; False if that was done before."""
        frozen, trained = self._bits()
        if trained >= n_bits:
            return False
        if trained > frozen:
            self._freeze_at(weight, trained)
        self.bits_trained = n_bits
        self.target.data = self._start_of_target(weight)
        self.target.grad = None
        return True

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Fixes the codes of all slices of the weight (O, I) and drops the target."""
        self._freeze_at(weight, self.depths[-1])
        self.bits_trained = self.depths[-1]
        self.target.data = self.target.new_empty(0, 0)
        self.target.grad = None

    @torch.no_grad()
    def bound_rounding(self, weight: Tensor) -> None:
        """Moves the target back to within half a step of its start, so that codes (O, I) move by 1 at most."""
        frozen, trained = self._bits()
        if trained > frozen:
            scale, _ = self._range(weight)
            half_step = by_group(scale, self.group_size, weight.shape[1]) * 2.0 ** -(trained + 1)
            start = in_groups(self._start_of_target(weight), self.group_size)
            in_groups(self.target, self.group_size).clamp_(start - half_step, start + half_step)

    @torch.no_grad()
    def bound_saturation(self, weight: Tensor) -> None:
        """Moves the target back to where the weight (O, I) is at most `max_saturation` finest steps off, if that is given."""
        frozen, trained = self._bits()
        if trained > frozen and self.max_saturation is not None:
            scale, _ = self._range(weight)
            limit = by_group(scale, self.group_size, weight.shape[1]) * (self.max_saturation * 2.0 ** -self.depths[-1])
            start = in_groups(weight.float(), self.group_size)
            in_groups(self.target, self.group_size).clamp_(start - limit, start + limit)

    def weight_at(self, weight: Tensor, n_slices: int) -> Tensor:
        """Gives the weight (O, I) float32 read with its first `n_slices` slices, differentiable in range and target."""
        scale, bias = self._range(weight)
        return self._read(weight, scale, bias, n_slices)

    def prefixes(self, weight: Tensor) -> Tensor:
        """Gives the weight read with 1, 2, ... S slices, (S, O, I) float32, differentiable in range and target."""
        scale, bias = self._range(weight)
        return torch.stack([self._read(weight, scale, bias, k + 1) for k in range(len(self.depths))])

    def forget(self) -> None:
        """Moves the codes of a finished block to the host, where they wait until they are read again."""
        super().forget()
        self.codes = self.codes.cpu()

    # ------------------------------------------------------------------ the code

    def _bits(self) -> tuple[int, int]:
        """Bits of the frozen code, and bits that the target reaches (as many, if there is none)."""
        return self.bits_frozen, max(self.bits_frozen, self.bits_trained)

    def _read(self, weight: Tensor, scale: Tensor, bias: Tensor, n_slices: int) -> Tensor:
        """The weight (O, I) float32 read with its first slices, in ranges of widths `scale` and centres `bias` (O, G)."""
        (frozen, trained), depth = self._bits(), self.depths[n_slices - 1]
        if trained == 0 and weight.requires_grad:  # a transform is being learned, and nothing else has begun
            return super().weight_at(weight, n_slices)

        learns = torch.is_grad_enabled()
        if learns and depth <= frozen:  # codes are given: linear in the range
            return dequantize(self._code(weight, scale, bias, depth), depth, scale, bias, self.group_size)

        def code_of(rows: slice) -> CodeOfRows:
            return self._code_at(weight, scale, bias, depth, rows, learns)

        source = self.target if trained > frozen else weight
        read: Tensor = TrainedCode.apply(source, scale, bias, code_of, depth, self.group_size, frozen == 0, learns)  # type: ignore[no-untyped-call]
        return read

    @torch.no_grad()
    def _code_at(
        self, weight: Tensor, scale: Tensor, bias: Tensor, depth: int, rows: slice, learns: bool
    ) -> CodeOfRows:
        """Codes of `depth` bits of some rows: frozen bits, then those of the target, then of the weight itself."""
        frozen, trained = self._bits()
        known = self._codes_on(weight)[rows].float() if frozen else None
        if depth <= frozen:
            assert known is not None
            return CodeOfRows((known * 2.0 ** (depth - frozen)).floor_())
        scale, bias = scale[rows], bias[rows]
        if trained == frozen:
            unit = unit_position(weight[rows], scale, bias, self.group_size)
            return CodeOfRows(refine(unit, known, frozen, depth), unit)
        unit = unit_position(self.target[rows], scale, bias, self.group_size)
        code = refine(unit, known, frozen, min(depth, trained))
        if depth <= trained:
            return CodeOfRows(code, unit)
        own = refine(unit_position(weight[rows], scale, bias, self.group_size), known, frozen, depth)
        code = own.clamp(*ends(code, depth - trained))
        return CodeOfRows(code, unit, stays=code == own if learns else None)

    def _code(self, weight: Tensor, scale: Tensor, bias: Tensor, depth: int) -> Tensor:
        """Codes (O, I) of `depth` bits, as floats, in ranges of widths `scale` and centres `bias` (O, G)."""
        return self._code_at(weight, scale, bias, depth, slice(None), learns=False).code

    def _freeze_at(self, weight: Tensor, n_bits: int) -> None:
        scale, bias = self._range(weight)
        self.codes = self._code(weight, scale, bias, n_bits).to(torch.uint8)
        self.bits_frozen = n_bits

    def _start_of_target(self, weight: Tensor) -> Tensor:
        """The weight (O, I), moved into the cells of the frozen code."""
        frozen, _ = self._bits()
        scale, bias = self._range(weight)
        if not frozen:
            return weight.detach().float().clone()
        low, columns = self._codes_on(weight).float() * 2.0**-frozen, weight.shape[1]
        unit = unit_position(weight, scale, bias, self.group_size)
        unit = unit.clamp_(low + _INSIDE, low + 2.0**-frozen - _INSIDE).sub_(0.5)
        centre, width = (by_group(values, self.group_size, columns) for values in (bias, scale))
        return in_groups(unit, self.group_size).mul_(width).add_(centre).flatten(1)

    def _codes_on(self, weight: Tensor) -> Tensor:
        if self.codes.device != weight.device:
            self.codes = self.codes.to(weight.device)
        return self.codes

    # ------------------------------------------------------------------ state

    def get_extra_state(self) -> Tensor:
        """Bits of the frozen code and bits that the target reaches, (2,) int64, for training checkpoints."""
        return torch.tensor([self.bits_frozen, self.bits_trained])

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the bits of the frozen code and the bits that the target reaches from `state` (2,) int64."""
        self.bits_frozen, self.bits_trained = state.tolist()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes on the sizes of the saved tensors: which of them are there depends on how far the training was."""
        target, codes = state.get(f"{prefix}target"), state.get(f"{prefix}codes")
        if target is not None:
            self.target.data = self.target.new_empty(target.shape)
        if codes is not None:
            self.codes = self.codes.new_empty(codes.shape)
        super()._load_from_state_dict(state, prefix, *args)
