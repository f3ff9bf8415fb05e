"""From scores to thresholds: the quantile of the scores at which the average depth is what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mobiq_lightning.strategies.together import summed

Scope = Literal["layer", "global"]
"""Whether each input meets the budget by itself, or all inputs together under one threshold."""


@dataclass(frozen=True)
class ThresholdTask:
    """What thresholds are wanted for: all routed inputs of a model, and the budgets that they are to meet.

    Args:
        scores: For each input, the scores (N, S - 1) of its N calibration tokens, under the prefix rule.
        sizes: For each input, the number of weights that it feeds.
        slice_bits: Bits of each of the S slices, coarsest first.
        budgets: Average bits per weight to meet.
        scope: ``layer``: each input meets the budget by itself (the rule of arXiv 2602.20191). ``global``: one threshold
            for all of them, at which the average over weights meets it.
    """

    scores: Sequence[Tensor]
    sizes: Sequence[int]
    slice_bits: tuple[int, ...]
    budgets: Sequence[float]
    scope: Scope = "layer"


def prefix_scores(scores: Tensor) -> Tensor:
    """Scores under the prefix rule: that of a slice is the lowest of its own and of all coarser ones.

    Args:
        scores: (..., S - 1) scores of the slices after the first.

    Returns:
        (..., S - 1) scores, not increasing along the last dimension.
    """
    if scores.shape[-1] == 0:
        return scores
    return torch.cummin(scores, dim=-1).values


def threshold_for_budget(
    scores: Tensor,
    slice_bits: Sequence[int],
    budgets: Sequence[float],
    weights: Tensor | None = None,
) -> Tensor:
    """Thresholds at which tokens read the asked bits on average (the quantile rule of arXiv 2602.20191, section 3).

    Opening one more (token, slice) pair, best score first, raises the average by that slice's bits; the threshold lies
    in the middle between the last pair that fits the budget and the first that does not. Pairs with equal scores open
    together or not at all, whichever comes nearer.

    Args:
        scores: (N, S - 1) scores of N tokens under the prefix rule: none above that of a coarser slice.
        slice_bits: Bits of the S slices, coarsest first.
        budgets: Average bits per weight; clamped to what the slices can give.
        weights: (N,) weight of each token in the average, by default all alike.

    Returns:
        (len(budgets),) float32 thresholds.
    """
    n_tokens = scores.shape[0]
    if n_tokens == 0 or scores.shape[1] == 0:
        return torch.zeros(len(budgets), device=scores.device)
    share = torch.full((n_tokens,), 1.0 / n_tokens, dtype=torch.float64, device=scores.device)
    if weights is not None:
        share = weights.double() / weights.double().sum()
    bits = torch.tensor(slice_bits[1:], dtype=torch.float64, device=scores.device)
    ordered, order = scores.detach().float().flatten().sort(descending=True, stable=True)
    average = slice_bits[0] + (share[:, None] * bits).flatten()[order].cumsum(0)
    last = torch.cat([ordered[1:] != ordered[:-1], ordered.new_ones(1, dtype=torch.bool)])  # of those with its score
    ordered, average = ordered[last], average[last]
    # Opening pair i is right if the average after it is nearer to the budget than the average before it.
    half_step = torch.diff(average, prepend=average.new_tensor([float(slice_bits[0])])) / 2
    wanted = torch.tensor(list(budgets), dtype=torch.float64, device=scores.device)
    n_open = torch.searchsorted(average - half_step, wanted, right=True)
    edges = torch.cat([ordered[:1] + 1.0, (ordered[:-1] + ordered[1:]) / 2, ordered[-1:] - 1.0])
    return edges[n_open]


def with_budget_gradient(
    threshold: Tensor,
    scores: Tensor,
    slice_bits: Sequence[int],
    temperature: float,
    weights: Tensor | None = None,
    together: bool = False,
) -> Tensor:
    """Gives a threshold the gradient that it has because the budget stays met when scores move.

    Differentiating ``sum(bits * sigmoid((score - threshold) / temperature)) = const`` gives the threshold as a mean of the
    scores, weighted by how much each gate still moves. A score then rises only if its gate saves more error per bit than
    the others at the threshold do. Without this, every open gate looks useful by itself, and an optimizer that normalises
    its steps (Adam) raises the scores of useless fine slices as fast as those of coarse ones.

    Args:
        threshold: Threshold that meets the budget, a scalar.
        scores: (N, S - 1) scores under the prefix rule, with their gradient.
        slice_bits: Bits of the S slices.
        temperature: Width of the gates' sigmoid.
        weights: (N,) weight of each token in the average, by default all alike.
        together: Whether the budget is that of the tokens of all processes that train together.

    Returns:
        The threshold, a scalar with that gradient.
    """
    bits = torch.tensor(slice_bits[1:], dtype=scores.dtype, device=scores.device)
    soft = torch.sigmoid((scores.detach() - threshold) / temperature)
    weight = bits * soft * (1 - soft)
    if weights is not None:
        weight = weight * weights.unsqueeze(-1)
    sums = torch.stack([(weight * scores).sum(), weight.sum()])
    total, weights_of_all = (summed(sums) if together else sums).unbind()
    mean = total / weights_of_all.clamp_min(1e-12)
    return threshold + mean - mean.detach()


def falling(table: Tensor) -> Tensor:
    """Gives the nearest table, in the mean square, whose thresholds do not rise with the budget.

    Thresholds that are tuned budget by budget may rise, since each is measured on inputs that the layers before it made
    at that budget; but a dial must never close a slice when it is turned up. Neighbours that rise are averaged (pool
    adjacent violators).

    Args:
        table: (..., budgets) thresholds by ascending budget.
    """
    rows = table.reshape(-1, table.shape[-1]).tolist()
    for row in rows:
        pools: list[tuple[float, int]] = []
        for value in row:
            pool = (value, 1)
            while pools and pools[-1][0] < pool[0]:
                mean, count = pools.pop()
                pool = ((mean * count + pool[0] * pool[1]) / (count + pool[1]), count + pool[1])
            pools.append(pool)
        row[:] = [mean for mean, count in pools for _ in range(count)]
    return torch.tensor(rows, dtype=table.dtype, device=table.device).reshape(table.shape)


def average_bits(scores: Tensor, slice_bits: Sequence[int], threshold: Tensor | float) -> Tensor:
    """Average bits (scalar, float64) that N tokens with scores (N, S - 1) under the prefix rule read at a threshold."""
    bits = torch.tensor(slice_bits[1:], dtype=torch.float64, device=scores.device)
    return slice_bits[0] + ((scores > threshold).double() * bits).sum(-1).mean()
