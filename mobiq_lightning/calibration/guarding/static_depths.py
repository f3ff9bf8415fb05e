"""Static depths for inputs whose router cannot tell tokens apart, as thresholds at which their tokens read one depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mobiq_lightning.calibration.guarding.collapse import mixes_depths, most_common_share
from mobiq_lightning.calibration.guarding.guard import DepthShare
from mobiq_lightning.calibration.sliced_source import SlicedSource
from mobiq_lightning.packing import depths_of
from mobiq_lightning.strategies.allocation import split_budget


class StaticDepths:
    """Mends thresholds where a router has collapsed.

    Args:
        sliced: The calibrated model.
        wanted: Is told of the largest share of tokens at one depth of an input, and says whether that input is to get static
            depths at this budget.
    """

    def __init__(self, sliced: SlicedSource, wanted: Callable[[DepthShare], bool]) -> None:
        self.sliced, self.wanted = sliced, wanted
        self.names: set[str] = set()
        """Names of the inputs that have got static depths at a budget so far."""

    def collapsed(self, thresholds: Tensor, scores: Sequence[Tensor], bits: float) -> list[int]:
        """Finds the inputs that are to get static depths at a budget, and keeps their names.

        Args:
            thresholds: (inputs, S), entry k of a row being for a model that holds the first k + 1 slices alone.
            scores: For each input, the scores (N, S - 1) of its tokens at this budget.
            bits: The budget.

        Returns:
            Numbers of the inputs, from 0.
        """
        inputs, names = self.sliced.all_inputs(), self.sliced.input_names()
        if not inputs[0].router.per_token or not mixes_depths(inputs[0].slice_bits, bits):
            return []
        shares = [most_common_share(s, float(t[-1])) for s, t in zip(scores, thresholds, strict=True)]
        static = [i for i, share in enumerate(shares) if self.wanted(DepthShare(names[i], bits, share))]
        self.names |= {names[i] for i in static}
        return static

    def mended(self, thresholds: Tensor, scores: Sequence[Tensor], bits: float, static: Sequence[int]) -> Tensor:
        """Thresholds at one budget that give static depths to the inputs whose routers have collapsed there.

        Args:
            thresholds: (inputs, S), entry k of a row being for a model that holds the first k + 1 slices alone.
            scores: For each input, the scores (N, S - 1) of its tokens at this budget.
            bits: The budget.
            static: Numbers of those inputs.

        Returns:
            (inputs, S); the given thresholds where nothing has collapsed.
        """
        inputs = self.sliced.all_inputs()
        slice_bits = inputs[0].slice_bits
        if not static or not mixes_depths(slice_bits, bits):
            return thresholds
        sizes = [inputs[i].n_weights for i in static]
        first = sum(depth < bits for depth in depths_of(slice_bits))  # models that hold less read all that they hold
        mended = thresholds.clone()
        for i, open_slices in zip(static, nested_allocation(sizes, slice_bits, bits), strict=True):
            mended[i, first:] = _threshold_for_depth(scores[i], open_slices)
        return mended


def nested_allocation(sizes: Sequence[int], slice_bits: tuple[int, ...], target_bits: float) -> list[int]:
    """Static depths that only grow with the budget, as thresholds must: an input that has moved up stays there.

    `StaticRouter.allocate` comes nearer to a budget, but may take a slice away from an input when the budget rises.

    Args:
        sizes: Weights that each input feeds.
        slice_bits: Bits of each slice.
        target_bits: Average bits per weight over these inputs.

    Returns:
        Slices after the base that each input reads.
    """
    lower, share = split_budget(slice_bits, target_bits)
    open_slices, given = [lower] * len(sizes), 0
    for i in sorted(range(len(sizes)), key=lambda i: i * 0.6180339887 % 1):  # golden ratio: spread over the model
        if given + sizes[i] / 2 > share * sum(sizes):
            break
        open_slices[i] += 1
        given += sizes[i]
    return open_slices


def _threshold_for_depth(scores: Tensor, open_slices: int) -> Tensor:
    """The threshold at which a typical token of (N, S - 1) scores opens so many slices after the base."""
    median = scores.float().median(dim=0).values
    edges = torch.cat([median[:1] + 1.0, (median[:-1] + median[1:]) / 2, median[-1:] - 1.0])
    return edges[open_slices]
