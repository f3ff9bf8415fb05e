"""Routers that cannot tell tokens apart: finding them by the scores that they give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mobiq_lightning.strategies import ThresholdTask
from mobiq_lightning.strategies.allocation import split_budget

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration


COLLAPSE_SHARE = 0.995
"""Share of tokens at one depth above which a router is no router any more."""


def mixes_depths(slice_bits: tuple[int, ...], bits: float) -> bool:
    """Whether tokens must read different depths to spend `bits`: at a depth of the slices, all at one is what was asked."""
    return 1 - COLLAPSE_SHARE < split_budget(slice_bits, bits)[1] < COLLAPSE_SHARE


def most_common_share(scores: Tensor, threshold: float) -> float:
    """Share of the tokens, by scores (N, S - 1) under the prefix rule, that read the most common depth."""
    counts = torch.bincount((scores > threshold).sum(-1))
    return float(counts.max() / counts.sum())


def worst_share(module: ElasticCalibration, number: int, scores: Tensor) -> tuple[float, float]:
    """The largest share of tokens at one depth, over the budgets that mix depths, and the first budget that has it.

    Args:
        module: The calibration.
        number: Of the input, as of `all_inputs`.
        scores: (N, S - 1) of its tokens.
    """
    routed = module.all_inputs()[number]
    budgets = [bits for bits in routed.budgets.tolist() if mixes_depths(routed.slice_bits, bits)]
    if not budgets:
        return 0.0, 0.0
    thresholds = routed.router.thresholds_for(ThresholdTask([scores], [routed.n_weights], routed.slice_bits, budgets))[
        0
    ]
    shares = [most_common_share(scores, float(threshold)) for threshold in thresholds]
    return max(shares), budgets[shares.index(max(shares))]
