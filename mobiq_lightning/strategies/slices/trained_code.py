"""The code of a trained target as a differentiable function of the target and of its ranges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mobiq_lightning.packing import by_group, in_groups, middles
from mobiq_lightning.strategies.slices.nested_code import cells, group_sum, outside_of_range


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
    return (unit * 2.0**n_bits).floor_().clamp_(*_ends(known, n_bits - known_bits))


def refine_beyond(
    unit: Tensor, trained: Tensor, n_trained: int, known: Tensor | None, n_known: int, n_bits: int
) -> tuple[Tensor, Tensor]:
    """Extends trained codes by bits of the weight itself, and says where the weight lies in another cell than the target.

    Args:
        unit: (O, I) positions of the weight in its range.
        trained: (O, I) trained codes, as floats.
        n_trained: Bits of the trained codes.
        known: (O, I) the frozen codes that they begin with, as floats; None if no bit is frozen.
        n_known: Bits of the frozen codes.
        n_bits: Bits of the result.

    Returns:
        (O, I) codes of `n_bits` bits, as floats, and (O, I) whether they depend on the trained ones: elsewhere the weight lies
        in the cell that the trained code names, and its finer bits are its own.
    """
    own = refine(unit, known, n_known, n_bits)
    code = own.clamp(*_ends(trained, n_bits - n_trained))
    return code, code != own


def _ends(known: Tensor, more: int) -> tuple[Tensor, Tensor]:
    """The first and the last of the codes with `more` bits more that begin with codes (O, I)."""
    first = known * 2.0**more
    return first, first + (2.0**more - 1)


class TrainedCode(Function):
    """Weights of a given code, with straight-through gradients for the target or weight that the code was made of.

    If `masked`, positions outside of the whole range have no gradient. Within it, a position that left the cell of the
    coarser code keeps its gradient, so that it can come back. What the backward pass needs is made in the forward pass, where
    the positions are known: one number for each weight if ranges are trained, and a byte for each mask.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        scale: Tensor,
        bias: Tensor,
        unit: Tensor,
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
            unit: (O, I) positions of `source` in the ranges.
            code: (O, I) the code of `source`, as floats.
            depth: Bits of the code.
            group_size: Columns per group.
            masked: Whether positions outside of the range have no gradient.
            moves: (O, I) whether what is read depends on `source`; None if all of it does.
        """
        of_source, of_range = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        outside = outside_of_range(unit) if masked else None
        position, slope = middles(code, depth), None
        if of_range:
            straight = unit - 0.5
            slope = position - (straight if outside is None else straight.masked_fill_(outside, 0.0))
        ctx.save_for_backward(slope, outside, moves if of_source else None)
        ctx.group_size = group_size
        columns = code.shape[1]
        read = in_groups(position, group_size).mul_(by_group(scale, group_size, columns))
        return read.add_(by_group(bias, group_size, columns)).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients of source (O, I), scale (O, G) and bias (O, G); None for those that need none, or have none."""
        slope, outside, moves = ctx.saved_tensors
        grad = grads[0]
        inside = grad if outside is None else grad.masked_fill(outside, 0.0)
        grad_source = grad_scale = grad_bias = None
        if slope is not None:
            grad_scale = group_sum(slope.mul(grad), ctx.group_size)
            grad_bias = None if outside is None else group_sum(grad - inside, ctx.group_size)
        if ctx.needs_input_grad[0]:
            grad_source = inside if moves is None else torch.where(moves, inside, 0.0)
        return grad_source, grad_scale, grad_bias, None, None, None, None, None, None
