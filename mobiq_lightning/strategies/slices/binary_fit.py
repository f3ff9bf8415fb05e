"""Greedy and alternating binary coding of groups of weights, many at once."""

from __future__ import annotations

import torch
from torch import Tensor

from mobiq_lightning.packing import SCALE_DTYPE
from mobiq_lightning.strategies.slices.fixed_codes import in_groups

_SMALLEST = 1e-30
"""Scale of a plane that has nothing to add: scales must be above 0."""
_RIDGE = 1e-7
"""Share of the number of weights added to the diagonal of the normal equations, which planes that are equal would make
singular."""


def fit_binary(
    weight: Tensor, slice_bits: tuple[int, ...], group_size: int, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fits planes of +1 and -1 with their scales to a weight, slice by slice.

    Args:
        weight: (O, I) float32, the weight or some of its rows.
        slice_bits: Bits of each slice.
        group_size: Columns per group.
        rounds: How often codes and scales take turns in each slice.

    Returns:
        Codes (O, I) uint8, a set bit for +1; scales (O, G, B) and bias (O, G), exact in the stored dtype.
    """
    residual, counts = in_groups(weight, group_size, 0.0)
    inside = torch.arange(residual.shape[-1], device=weight.device) < counts.unsqueeze(-1)
    codes = torch.zeros_like(residual, dtype=torch.uint8)
    bias = torch.zeros_like(residual[..., 0])
    scales: list[Tensor] = []
    for number, bits in enumerate(slice_bits):
        shift, own = _greedy(residual, inside, counts, bits, with_bias=number == 0)
        for _ in range(rounds):
            signs = _signs(_nearest(residual, shift, own)[0], bits) * inside.unsqueeze(-1)
            shift, own = _least_squares(residual, signs, inside if number == 0 else None)
        shift, own = _stored(shift), _stored(own).clamp_min(_SMALLEST)
        found, read = _nearest(residual, shift, own)
        codes = (codes << bits) | found
        residual = (residual - read) * inside
        bias = bias + shift
        scales.append(own)
    columns = weight.shape[1]
    return codes.flatten(1)[:, :columns], torch.cat(scales, -1), bias


def _greedy(x: Tensor, inside: Tensor, counts: Tensor, bits: int, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Bias (O, G) and scales (O, G, bits) of planes, each the sign of what those before leave of x (O, G, N)."""
    bias = x.sum(-1) / counts if with_bias else torch.zeros_like(x[..., 0])
    left = (x - bias.unsqueeze(-1)) * inside
    scales = []
    for _ in range(bits):
        scale = left.abs().sum(-1) / counts
        left = (left - torch.where(left >= 0, 1.0, -1.0) * scale.unsqueeze(-1)) * inside
        scales.append(scale)
    return bias, torch.stack(scales, -1)


def _nearest(x: Tensor, bias: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (O, G, N) uint8 of the nearest value to each of x (O, G, N), and that value, float32."""
    signs = _signs(torch.arange(2 ** scales.shape[-1], device=x.device), scales.shape[-1])
    levels = bias.unsqueeze(-1) + (scales.double() @ signs.double().t()).float()
    levels, order = levels.sort(dim=-1, stable=True)
    place = torch.searchsorted((levels[..., 1:] + levels[..., :-1]) / 2, x.contiguous())
    return order.gather(-1, place).to(torch.uint8), levels.gather(-1, place)


def _least_squares(x: Tensor, signs: Tensor, constant: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bias (O, G) and scales (O, G, bits) that bring planes closest to x (O, G, N).

    Args:
        x: (O, G, N) values by group, 0 outside of the group.
        signs: (O, G, N, bits) planes, 0 outside of the group.
        constant: (G, N) bool, which places are inside of the group; None to fit no bias.
    """
    basis = signs.double()
    if constant is not None:
        basis = torch.cat([basis, constant.double().expand_as(x).unsqueeze(-1)], -1)
    size = basis.shape[-1]
    normal = basis.transpose(-1, -2) @ basis
    normal += _RIDGE * x.shape[-1] * torch.eye(size, dtype=torch.float64, device=x.device)
    wanted = basis.transpose(-1, -2) @ x.double().unsqueeze(-1)
    solved = torch.linalg.solve(normal, wanted).squeeze(-1).float()
    scales = solved[..., : signs.shape[-1]].abs()  # the same levels: codes are found anew
    return (torch.zeros_like(x[..., 0]) if constant is None else solved[..., -1]), scales


def _signs(codes: Tensor, bits: int) -> Tensor:
    """(..., bits) float32: +1 where the bit of a code is set, else -1, the most significant first."""
    shifts = torch.arange(bits - 1, -1, -1, device=codes.device)
    return ((codes.unsqueeze(-1) >> shifts) & 1).float() * 2 - 1


def _stored(values: Tensor) -> Tensor:
    return values.to(SCALE_DTYPE).float()
