"""Makes the controls of a comparison: allocations that a router has to beat, at the very bits that it used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mobiq_lightning.nn import RoutedInput
from mobiq_lightning.runs import Control
from mobiq_lightning.strategies import RandomRouter, StaticRouter, ThresholdTask
from mobiq_lightning.strategies.allocation import best_depths, split_budget
from mobiq_lightning.strategies.base import Router


def control_thresholds(
    control: Control,
    sizes: Sequence[int],
    slice_bits: tuple[int, ...],
    spent: Sequence[float],
    seed: int = 0,
    gains: Tensor | None = None,
) -> Tensor:
    """Thresholds (inputs,) at which a control spends as many bits as the router did.

    Args:
        control: Name of the control. `static` draws layers at random, `layers` chooses those to which the next slice gains
            most, `shuffled` draws tokens at random within each input, and `random` draws tokens at random over all inputs
            alike.
        sizes: Number of weights that read each input.
        slice_bits: Bits of each slice.
        spent: Mean bits that the router read of each input's weights. `shuffled` spends them input by input, the others
            their mean over weights.
        seed: Seed of the draw of `static`.
        gains: (inputs, S - 1) gain of each slice, which `layers` needs.
    """
    mean = sum(bits * size for bits, size in zip(spent, sizes, strict=True)) / sum(sizes)
    if control == "static":
        return StaticRouter.thresholds_for(ThresholdTask([], sizes, slice_bits, [mean]), seed)[:, 0]
    if control == "layers":
        assert gains is not None
        worth = torch.cat([gains.new_zeros(len(sizes), 1), gains.cumsum(1)], dim=1)
        # Gains are measured around a depth, and add up there alone: a mixture of the two next depths is what they can predict.
        lower, part = split_budget(slice_bits, mean)
        allowed = torch.zeros_like(worth, dtype=torch.bool)
        allowed[:, lower : lower + 1 + (part > 0)] = True
        return torch.tensor([0.5 - n_open for n_open in best_depths(worth, sizes, slice_bits, mean, allowed)])
    budgets = list(spent) if control == "shuffled" else [mean] * len(sizes)
    return torch.stack(
        [RandomRouter.thresholds_for(ThresholdTask([], [1], slice_bits, [bits]))[0, 0] for bits in budgets]
    )


def control_router(control: Control, routed: RoutedInput, seed: int, threshold: Tensor) -> Router:
    """Makes the router of a control for one input: static for whole layers, else one that scores tokens at random.

    Args:
        control: Name of the control.
        routed: Input that the router is for.
        seed: Seed of random scores.
        threshold: Scalar, the threshold of this input as `control_thresholds` gives it.

    Returns:
        The router, on the host and in eval mode.
    """
    width = (routed.router.in_features, len(routed.slice_bits))
    router = StaticRouter(*width) if control in ("static", "layers") else RandomRouter(*width, seed=seed)
    router.threshold.copy_(threshold)
    return router.eval()
