"""The nested code as a differentiable function of the weight and of its ranges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from mobiq_lightning.packing import by_group, dequantize, in_groups, middles

_BELOW_ONE = 1 - 2.0**-24
"""The largest float32 below 1."""
_ON_CPU, _ELSEWHERE = 2**17, 2**24
"""Weights that are computed at a time."""


class NestedCode(Function):
    """Weights read at one or more depths, with straight-through gradients in closed form.

    With ``u = (W - bias) / scale + 1/2`` the weight at depth p is ``bias + scale * k_p``, where ``k_p`` is the middle of
    the cell of u among ``2^p``, less 1/2. Straight through, ``dk_p / du`` is 1 where u lies in [0, 1) and 0 where it was
    clipped, hence ``dW_p / dscale = k_p - inside * (u - 1/2)``, ``dW_p / dbias = 1 - inside`` and ``dW_p / dW = inside``.
    Written out, this takes a few passes over the weight instead of the dozens that autograd would record.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, bias: Tensor, group_size: int, depths: tuple[int, ...]
    ) -> Tensor:
        """Computes the weight read at each depth.

        Args:
            ctx: Context of autograd, which keeps tensors for the backward pass.
            weight: (O, I) the full-precision weight.
            scale: (O, G) widths of the ranges, as stored.
            bias: (O, G) centres of the ranges, as stored.
            group_size: Columns per group.
            depths: Depths to read, in bits.

        Returns:
            (len(depths), O, I) float32 weights.
        """
        ctx.save_for_backward(weight, scale, bias)
        ctx.group_size, ctx.depths = group_size, depths
        read = torch.empty(len(depths), *weight.shape, device=weight.device)
        for rows in row_blocks(weight):
            unit = unit_position(weight[rows], scale[rows], bias[rows], group_size)
            for number, p in enumerate(depths):
                read[number, rows] = dequantize(cells(unit, p), p, scale[rows], bias[rows], group_size)
        return read

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        """Computes the gradients of weight (O, I), scale (O, G) and bias (O, G); None for a weight that needs none."""
        weight, scale, bias = ctx.saved_tensors
        size, of_weight = ctx.group_size, ctx.needs_input_grad[0]
        grad_weight = torch.empty(weight.shape, device=weight.device) if of_weight else None
        of_scale: list[Tensor] = []
        of_bias: list[Tensor] = []
        for rows in row_blocks(weight):
            unit = unit_position(weight[rows], scale[rows], bias[rows], size)
            outside, total = outside_of_range(unit), grads[0][:, rows].sum(0)
            grad_scale = (unit - 0.5).masked_fill_(outside, 0.0).mul_(total).neg_()
            for grad, depth in zip(grads[0], ctx.depths, strict=True):
                grad_scale.addcmul_(grad[rows], middles(cells(unit, depth), depth))
            inside = total.masked_fill(outside, 0.0)
            of_scale.append(group_sum(grad_scale, size))
            of_bias.append(group_sum(total - inside, size))
            if grad_weight is not None:
                grad_weight[rows] = inside
        return grad_weight, torch.cat(of_scale), torch.cat(of_bias), None, None


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Parts of the rows of a weight (O, I) that are computed one after the other.

    On a CPU few enough that a tensor of them stays in its cache; elsewhere as many as still leave memory for the rest.
    """
    rows, columns = weight.shape
    step = max(1, (_ON_CPU if weight.device.type == "cpu" else _ELSEWHERE) // columns)
    return (slice(first, first + step) for first in range(0, rows, step))


def unit_position(weight: Tensor, scale: Tensor, bias: Tensor, group_size: int) -> Tensor:
    """Position (O, I) of each weight (O, I) in the range of its group: 0 at the low end, 1 at the high end."""
    columns = weight.shape[1]
    low, width = by_group(bias, group_size, columns), by_group(scale, group_size, columns)
    return (in_groups(weight.float(), group_size) - low).div_(width).add_(0.5).flatten(1)


def outside_of_range(unit: Tensor) -> Tensor:
    """Whether positions (O, I) are outside of [0, 1), where the range ends."""
    return unit != unit.clamp(0.0, _BELOW_ONE)


def cells(unit: Tensor, n_bits: int) -> Tensor:
    """Index (O, I), as a float, of the nearest cell to each position (O, I) among ``2 ** n_bits`` cells of [0, 1).

    Scaling by a power of two is exact, so the cell among ``2^p`` is the leading p bits of that
    among ``2^B``.
    """
    return (unit * 2.0**n_bits).floor_().clamp_(0, 2**n_bits - 1)


def group_sum(per_weight: Tensor, group_size: int) -> Tensor:
    """Sums values of weights (O, I) over the columns of each group: (O, G)."""
    group_size = min(group_size, per_weight.shape[1])
    missing = -per_weight.shape[1] % group_size
    padded = F.pad(per_weight, (0, missing)) if missing else per_weight
    sums: Tensor = padded.unflatten(1, (-1, group_size)).sum(-1)
    return sums
