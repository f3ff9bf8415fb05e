"""The code of a trained target as a differentiable function of the target and of its ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mobiq_lightning.packing import by_group, in_groups, middles
from mobiq_lightning.strategies.slices.nested_code import cells, group_sum, outside_of_range, row_blocks


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
    return (unit * 2.0**n_bits).floor_().clamp_(*ends(known, n_bits - known_bits))


def ends(known: Tensor, more: int) -> tuple[Tensor, Tensor]:
    """The first and the last of the codes with `more` bits more that begin with codes (O, I)."""
    first = known * 2.0**more
    return first, first + (2.0**more - 1)


@dataclass(frozen=True)
class CodeOfRows:
    """The code of some rows of a weight.

    Args:
        code: (R, I) codes, as floats.
        unit: (R, I) positions, in their ranges, of what the codes were made of; None if codes are given.
        stays: (R, I) where the codes do not depend on the target, since the weight, whose finer bits they take on, lies in the
            cell of the target; None if all of them do.
    """

    code: Tensor
    unit: Tensor | None = None
    stays: Tensor | None = None


class TrainedCode(Function):
    """Weights of a given code, with straight-through gradients for the target or weight that the code was made of.

    If `masked`, positions outside of the whole range have no gradient. Within it, a position that left the cell of the
    coarser code keeps its gradient, so that it can come back. What the backward pass needs is made in the forward pass, where
    the positions are known: one number for each weight if ranges are trained, and a byte for each mask. Some rows at a time,
    so that what comes and goes is small, and stays in the cache of a processor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        scale: Tensor,
        bias: Tensor,
        code_of: Callable[[slice], CodeOfRows],
        depth: int,
        group_size: int,
        masked: bool,
        learns: bool,
    ) -> Tensor:
        """Computes the weights (O, I) float32 of a code.

        Args:
            ctx: Context of autograd, which keeps tensors for the backward pass.
            source: (O, I) the trained target, or the weight.
            scale: (O, G) widths of the ranges.
            bias: (O, G) centres of the ranges.
            code_of: Gives the code of some rows.
            depth: Bits of the code.
            group_size: Columns per group.
            masked: Whether positions outside of the range have no gradient.
            learns: Whether there will be a backward pass.
        """
        of_source, of_range = (learns and any(ctx.needs_input_grad[part]) for part in (slice(0, 1), slice(1, 3)))
        read = torch.empty(source.shape, device=source.device)
        slope = torch.empty_like(read) if of_range else None
        outside = torch.empty_like(read, dtype=torch.bool) if masked and (of_source or of_range) else None
        stays: list[Tensor] = []
        columns = source.shape[1]
        for rows in row_blocks(source):
            made = code_of(rows)
            position = middles(made.code, depth)
            if outside is not None and made.unit is not None:
                outside[rows] = outside_of_range(made.unit)
            if slope is not None and made.unit is not None:
                straight = made.unit.sub_(0.5)
                if outside is not None:
                    straight.masked_fill_(outside[rows], 0.0)
                torch.sub(position, straight, out=slope[rows])
            if of_source and made.stays is not None:
                stays.append(made.stays)
            in_rows = in_groups(position, group_size).mul_(by_group(scale[rows], group_size, columns))
            read[rows] = in_rows.add_(by_group(bias[rows], group_size, columns)).flatten(1)
        ctx.save_for_backward(slope, outside, torch.cat(stays) if stays else None)
        ctx.group_size = group_size
        return read

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients of source (O, I), scale (O, G) and bias (O, G); None for those that need none, or have none."""
        slope, outside, stays = ctx.saved_tensors
        grad = grads[0]
        of_source = torch.empty_like(grad) if ctx.needs_input_grad[0] else None
        of_scale: list[Tensor] = []
        of_bias: list[Tensor] = []
        for rows in row_blocks(grad):
            inside = grad[rows] if outside is None else grad[rows].masked_fill(outside[rows], 0.0)
            if slope is not None:
                of_scale.append(group_sum(slope[rows] * grad[rows], ctx.group_size))
                if outside is not None:
                    of_bias.append(group_sum(grad[rows] - inside, ctx.group_size))
            if of_source is not None:
                of_source[rows] = inside if stays is None else inside.masked_fill(stays[rows], 0.0)
        of_ranges = [torch.cat(found) if found else None for found in (of_scale, of_bias)]
        return of_source, *of_ranges, None, None, None, None, None
