"""The controls of a comparison: allocations that a router has to beat, at the very bits that it used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mobiq_lightning.nn import RoutedInput
from mobiq_lightning.runs import Control
from mobiq_lightning.strategies import RandomRouter, StaticRouter, ThresholdTask
from mobiq_lightning.strategies.allocation import best_depths
from mobiq_lightning.strategies.base import Router


def control_thresholds(
    control: Control,
    sizes: Sequence[int],
    slice_bits: tuple[int, ...],
    spent: Sequence[float],
    seed: int = 0,
    gains: Tensor | None = None,
) -> Tensor:
    """Thresholds (inputs,) at which a control spends what the router did.

    Args:
        control: `static`: layers drawn. `layers`: layers chosen by what they gain. `shuffled`: tokens drawn within the
            router's layers. `random`: tokens drawn.
        sizes: Weights that each input feeds.
        slice_bits: Bits of each slice.
        spent: Mean bits that the router read of each input's weights. `shuffled` spends them input by input, the others
            their mean over weights.
        seed: Of the draw of `static`.
        gains: (inputs, S - 1) what each slice gains, for `layers`.
    """
    mean = sum(bits * size for bits, size in zip(spent, sizes, strict=True)) / sum(sizes)
    if control == "static":
        return StaticRouter.thresholds_for(ThresholdTask([], sizes, slice_bits, [mean]), seed)[:, 0]
    if control == "layers":
        assert gains is not None
        worth = torch.cat([gains.new_zeros(len(sizes), 1), gains.cumsum(1)], dim=1)
        return torch.tensor([0.5 - n_open for n_open in best_depths(worth, sizes, slice_bits, mean)])
    budgets = list(spent) if control == "shuffled" else [mean] * len(sizes)
    return torch.stack(
        [RandomRouter.thresholds_for(ThresholdTask([], [1], slice_bits, [bits]))[0, 0] for bits in budgets]
    )


def control_router(control: Control, routed: RoutedInput, seed: int, threshold: Tensor) -> Router:
    """The router that reads an input at a threshold of `control_thresholds`; on the host, in eval mode."""
    width = (routed.router.in_features, len(routed.slice_bits))
    router = StaticRouter(*width) if control in ("static", "layers") else RandomRouter(*width, seed=seed)
    router.threshold.copy_(threshold)
    return router.eval()
