"""Routers that cannot tell tokens apart: finding them by the scores that they give."""

from __future__ import annotations

import torch
from torch import Tensor

from mobiq_lightning.nn import RoutedInput
from mobiq_lightning.strategies import ThresholdTask
from mobiq_lightning.strategies.allocation import split_budget

COLLAPSE_SHARE = 0.995
"""Share of tokens at one depth above which a router is no router any more."""


def mixes_depths(slice_bits: tuple[int, ...], bits: float) -> bool:
    """Whether tokens must read different depths to spend `bits`: at a depth of the slices, all at one is what was asked."""
    return 1 - COLLAPSE_SHARE < split_budget(slice_bits, bits)[1] < COLLAPSE_SHARE


def most_common_share(scores: Tensor, threshold: float) -> float:
    """Share of the tokens, by scores (N, S - 1) under the prefix rule, that read the most common depth."""
    counts = torch.bincount((scores > threshold).sum(-1))
    return float(counts.max() / counts.sum())


def worst_share(routed: RoutedInput, scores: Tensor) -> tuple[float, float]:
    """The largest share of tokens at one depth, over the budgets that mix depths, and the first budget that has it.

    Args:
        routed: The input, with its router.
        scores: (N, S - 1) scores that the router gives to the tokens of the input.
    """
    steps = routed.budgets[routed.run_columns].tolist()  # nearer to a depth most tokens read that anyway
    budgets = [bits for bits in steps if mixes_depths(routed.slice_bits, bits)]
    if not budgets:
        return 0.0, 0.0
    thresholds = routed.router.thresholds_for(ThresholdTask([scores], [routed.n_weights], routed.slice_bits, budgets))[
        0
    ]
    shares = [most_common_share(scores, float(threshold)) for threshold in thresholds]
    return max(shares), budgets[shares.index(max(shares))]
