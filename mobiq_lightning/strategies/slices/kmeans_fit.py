"""One-dimensional k-means of groups of weights, and its clusters cut in two again and again, many groups at once.

Clusters of numbers are intervals of their sorted order, so a clustering is the places where its clusters begin, and a mean is
a difference of running sums. Weights are counted in ``2^-30`` of the largest of their group: sums of integers are exact, so
that every device and every order of summation finds the same clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mobiq_lightning.strategies.slices.fixed_codes import in_groups

_UNITS = 2**30
_BASE_ROUNDS, _SPLIT_ROUNDS = 20, 8
_BEYOND = 2**40
"""Larger than any weight in units; fills up short groups."""


class _Sorted(NamedTuple):
    """Groups in ascending order.

    Args:
        values: (O, G, N) int64, ascending, `_BEYOND` after the last of a group.
        sums: (O, G, N + 1) int64 sums of the values before each place.
        counts: (G, 1) numbers of values of each group.
    """

    values: Tensor
    sums: Tensor
    counts: Tensor

    def means(self, starts: Tensor, ends: Tensor) -> Tensor:
        """Mean (O, G, K) float64 of the values from `starts` to before `ends`; where there are none, the next value.

        The next value keeps means in ascending order, and lets clusters without weights receive some.
        """
        number = ends - starts
        total = self.sums.gather(-1, ends) - self.sums.gather(-1, starts)
        following = self.values.gather(-1, starts.minimum(self.counts - 1))
        return torch.where(number > 0, total.double() / number.clamp_min(1), following.double())

    def first_above(self, bounds: Tensor) -> Tensor:
        """Places (O, G, K) of the first values above bounds (O, G, K) float64."""
        return torch.searchsorted(self.values, bounds.floor().long(), right=True)


def fit_clusters(weight: Tensor, depths: tuple[int, ...], group_size: int) -> tuple[Tensor, list[Tensor]]:
    """Finds nested clusters of the weights of each group.

    Args:
        weight: (O, I) float32, the weight or some of its rows.
        depths: Bits at which clusters are wanted; the first is found as a whole, the others by cutting clusters in two.
        group_size: Columns per group.

    Returns:
        Codes (O, I) uint8 at the last depth, and for each depth the means (O, G, 2^p) float32 of the clusters.
    """
    padded, counts = in_groups(weight.double(), group_size, 0.0)
    unit = padded.abs().amax(-1, keepdim=True).clamp_min(1e-38) / _UNITS
    inside = torch.arange(padded.shape[-1], device=weight.device) < counts.unsqueeze(-1)
    values, order = torch.where(inside, (padded / unit).round().long(), _BEYOND).sort(dim=-1, stable=True)
    sums = torch.nn.functional.pad((values * inside).cumsum(-1), (1, 0))
    ordered = _Sorted(values, sums, counts.unsqueeze(-1))
    edges = _cluster(ordered, 2 ** depths[0])
    tables = [ordered.means(edges[..., :-1], edges[..., 1:]) * unit]
    for depth in range(depths[0] + 1, depths[-1] + 1):
        edges = _split(ordered, edges)
        if depth in depths:
            tables.append(ordered.means(edges[..., :-1], edges[..., 1:]) * unit)
    place = torch.arange(values.shape[-1], device=weight.device).expand_as(values).contiguous()
    codes = torch.searchsorted(edges[..., 1:-1].contiguous(), place, right=True)
    codes = torch.zeros_like(codes).scatter_(-1, order, codes).to(torch.uint8)
    return codes.flatten(1)[:, : weight.shape[1]], [table.float() for table in tables]


def _cluster(ordered: _Sorted, number: int) -> Tensor:
    """Edges (O, G, number + 1) of the clusters that Lloyd's rounds find, starting with equally many values in each."""
    shares = torch.arange(number + 1, device=ordered.values.device)
    edges = (shares * ordered.counts // number).expand(*ordered.values.shape[:-1], -1)
    for _ in range(_BASE_ROUNDS):
        means = ordered.means(edges[..., :-1], edges[..., 1:])
        inner = ordered.first_above((means[..., 1:] + means[..., :-1]) / 2)
        edges = torch.cat([edges[..., :1], inner, edges[..., -1:]], -1)
    return edges


def _split(ordered: _Sorted, edges: Tensor) -> Tensor:
    """Edges (O, G, 2 K + 1) after each of K clusters was cut in two, at first at its mean, then by Lloyd's rounds."""
    starts, ends = edges[..., :-1], edges[..., 1:]

    def cut_at(bounds: Tensor) -> Tensor:
        return ordered.first_above(bounds).clamp(starts, ends)

    cut = cut_at(ordered.means(starts, ends))
    for _ in range(_SPLIT_ROUNDS):
        cut = cut_at((ordered.means(starts, cut) + ordered.means(cut, ends)) / 2)
    return torch.cat([torch.stack([starts, cut], -1).flatten(-2), edges[..., -1:]], -1)
