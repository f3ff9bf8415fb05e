"""Nested codes that are learned slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mobiq_lightning.packing import dequantize, spread
from mobiq_lightning.strategies.abilities import TrainableCodes
from mobiq_lightning.strategies.base import DEFAULT_SLICE_BITS
from mobiq_lightning.strategies.slices.nested_code import cells, group_sum, unit_position
from mobiq_lightning.strategies.slices.residual import ResidualSlices

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

    Args:
        out_features: Rows of the weight, O.
        in_features: Columns of the weight, I; the last group may be shorter than `group_size`.
        slice_bits: Bits of each slice, coarsest first; any positive integers with a sum of at most 8.
        group_size: Columns that share one range.

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
    ) -> None:
        super().__init__(out_features, in_features, slice_bits, group_size)
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
            step = spread(scale, self.group_size, weight.shape[1]) * 2.0**-trained
            start = self._start_of_target(weight)
            self.target.copy_(self.target.clamp(start - step / 2, start + step / 2))

    def weight_at(self, weight: Tensor, n_slices: int) -> Tensor:
        """Gives the weight (O, I) float32 read with its first `n_slices` slices, differentiable in range and target."""
        return self._read(weight, (self.depths[n_slices - 1],))[0]

    def prefixes(self, weight: Tensor) -> Tensor:
        """Gives the weight read with 1, 2, ... S slices, (S, O, I) float32, differentiable in range and target."""
        return self._read(weight, self.depths)

    def forget(self) -> None:
        """Moves the codes of a finished block to the host, where they wait until they are read again."""
        self.codes = self.codes.cpu()

    # ------------------------------------------------------------------ the code

    def _bits(self) -> tuple[int, int]:
        """Bits of the frozen code, and bits that the target reaches (as many, if there is none)."""
        return self.bits_frozen, max(self.bits_frozen, self.bits_trained)

    def _read(self, weight: Tensor, depths: tuple[int, ...]) -> Tensor:
        """The weight read at each depth, (len(depths), O, I) float32."""
        scale, bias = self._range(weight)
        frozen, trained = self._bits()
        if trained == 0 and weight.requires_grad:  # a transform is being learned, and nothing else has begun
            return torch.stack(
                [super(ProgressiveSlices, self).weight_at(weight, self.depths.index(p) + 1) for p in depths]
            )
        return torch.stack([self._read_one(weight, scale, bias, p, frozen, trained) for p in depths])

    def _read_one(self, weight: Tensor, scale: Tensor, bias: Tensor, depth: int, frozen: int, trained: int) -> Tensor:
        code = self._code(weight, scale, bias, depth)
        if depth <= frozen:  # codes are given: linear in the range
            return dequantize(code, depth, scale, bias, self.group_size)
        if trained == frozen:
            source, moves = weight.float(), None
        else:
            source, moves = self.target, self._moves(weight, scale, bias, depth, trained)
        read: Tensor = TrainedCode.apply(source, scale, bias, code, depth, self.group_size, frozen == 0, moves)  # type: ignore[no-untyped-call]
        return read

    @torch.no_grad()
    def _moves(self, weight: Tensor, scale: Tensor, bias: Tensor, depth: int, trained: int) -> Tensor | None:
        """(O, I) whether what is read at a depth depends on the target; None if all of it does.

        Beyond the slice in training, finer bits code the weight itself. Where the weight lies in the cell of the
        target, what is read therefore does not depend on the target.
        """
        if depth <= trained:
            return None
        frozen, _ = self._bits()
        known = self._codes_on(weight).float() if frozen else None
        home = refine(unit_position(weight, scale, bias, self.group_size), known, frozen, trained)
        return home != self._code(weight, scale, bias, trained)

    @torch.no_grad()
    def _code(self, weight: Tensor, scale: Tensor, bias: Tensor, depth: int) -> Tensor:
        """Codes (O, I) of `depth` bits, as floats: frozen bits, then those of the target, then of the weight itself."""
        frozen, trained = self._bits()
        known, bits = (self._codes_on(weight).float(), frozen) if frozen else (None, 0)
        if depth <= frozen:
            assert known is not None
            return (known * 2.0 ** (depth - frozen)).floor_()
        if trained > frozen:
            known = refine(unit_position(self.target, scale, bias, self.group_size), known, bits, min(depth, trained))
            bits = min(depth, trained)
        if depth > bits:
            known = refine(unit_position(weight, scale, bias, self.group_size), known, bits, depth)
        assert known is not None
        return known

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
        low = self._codes_on(weight).float() * 2.0**-frozen
        unit = unit_position(weight, scale, bias, self.group_size)
        unit = torch.minimum(torch.maximum(unit, low + _INSIDE), low + 2.0**-frozen - _INSIDE)
        centre, width = (spread(values, self.group_size, weight.shape[1]) for values in (bias, scale))
        return centre + width * (unit - 0.5)

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


def refine(unit: Tensor, known: Tensor | None, known_bits: int, n_bits: int) -> Tensor:
    """Extends codes whose first `known_bits` are given to `n_bits` bits: the nearest cell within the one that is known.

    Args:
        unit: (O, I) positions in the range: 0 at the low end, 1 at the high end.
        known: (O, I) known codes, as floats; None if no bit is given.
        known_bits: Bits of the known codes.
        n_bits: Bits of the result.

    Returns:
        (O, I) codes of `n_bits` bits, as floats.
    """
    if known is None:
        return cells(unit, n_bits)
    below = 2.0 ** (n_bits - known_bits)
    first = known * below
    return torch.minimum(torch.maximum((unit * 2.0**n_bits).floor_(), first), first + (below - 1))


class TrainedCode(Function):
    """Weights of a given code, with straight-through gradients for the target or weight that the code was made of.

    If `masked`, positions outside of the whole range have no gradient. Within it, a position that left the cell of the
    coarser code keeps its gradient, so that it can come back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        scale: Tensor,
        bias: Tensor,
        code: Tensor,
        depth: int,
        group_size: int,
        masked: bool,
        moves: Tensor | None,
    ) -> Tensor:
        """Computes the weights (O, I) float32 of a code.

        Args:
            ctx: Context of autograd, which keeps tensors for the backward pass.
            source: (O, I) the trained target, or the weight.
            scale: (O, G) widths of the ranges.
            bias: (O, G) centres of the ranges.
            code: (O, I) the code of `source`, as floats.
            depth: Bits of the code.
            group_size: Columns per group.
            masked: Whether positions outside of the range have no gradient.
            moves: (O, I) whether what is read depends on `source`; None if all of it does.
        """
        ctx.save_for_backward(source, scale, bias, code, moves)
        ctx.depth, ctx.group_size, ctx.masked = depth, group_size, masked
        return dequantize(code, depth, scale, bias, group_size)

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None, None]:
        """Computes the gradients of source (O, I), scale (O, G) and bias (O, G); None for those that need none."""
        source, scale, bias, code, moves = ctx.saved_tensors
        grad, group_size = grads[0], ctx.group_size
        unit = unit_position(source, scale, bias, group_size)
        inside = ((unit >= 0) & (unit < 1)).float() if ctx.masked else torch.ones_like(unit)
        grad_scale = grad_bias = None
        if ctx.needs_input_grad[1]:
            position = (code + 0.5) * 2.0**-ctx.depth - 0.5
            grad_scale = group_sum(grad * (position - inside * (unit - 0.5)), group_size)
            grad_bias = group_sum(grad * (1 - inside), group_size)
        grad_source = grad * inside if ctx.needs_input_grad[0] else None
        if grad_source is not None and moves is not None:
            grad_source *= moves
        return grad_source, grad_scale, grad_bias, None, None, None, None, None
