"""Control: every token of an input reads the same depth."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mobiq_lightning.strategies.allocation import level_scores, split_budget
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.thresholds import ThresholdTask


class StaticRouter(Router):
    """The same depth for all tokens; a budget between two depths is met by mixing inputs of the two.

    Inputs are given the upper or the lower depth by error diffusion over their weights, largest first, so that the
    two depths are spread over the whole model and the small inputs settle what the large ones leave.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.

    Example:
        ``router: {class_path: StaticRouter}``
    """

    per_token = False

    def scores(self, x: Tensor) -> Tensor:
        """Scores (..., S - 1) for tokens `x` (..., I): 0, -1, -2, ... for every token."""
        return level_scores(self.n_slices, x.device).expand(*x.shape[:-1], -1)

    @classmethod
    def thresholds_for(cls, task: ThresholdTask, seed: int = 0) -> Tensor:
        """Computes thresholds at which the mean over weights meets each budget, though the inputs' own averages differ.

        Which inputs get the upper depth is one draw of many, and on small models it matters.

        Args:
            task: The sizes of the inputs and the budgets to meet; scores and scope are not looked at.
            seed: Seed of the draw; 0 takes inputs of one size in the order of the model.

        Returns:
            (inputs, budgets) float32 thresholds.
        """
        columns = [
            [0.5 - n_open for n_open in cls.allocate(task.sizes, task.slice_bits, bits, seed)] for bits in task.budgets
        ]
        return torch.tensor(columns).T

    @staticmethod
    def allocate(sizes: Sequence[int], slice_bits: tuple[int, ...], target_bits: float, seed: int = 0) -> list[int]:
        """Decides how many slices after the base each input reads, 0 to S - 1.

        Args:
            sizes: Weights that each input feeds.
            slice_bits: Bits of each slice.
            target_bits: Average bits per weight over all inputs.
            seed: Seed of the order in which inputs of one size are considered; with 0 it is that of the model.

        Returns:
            One number for each input, in the order of `sizes`.
        """
        lower, share = split_budget(slice_bits, target_bits)
        n_open = [lower] * len(sizes)
        seen = given = 0.0
        inputs = list(range(len(sizes)))
        if seed:
            random.Random(seed).shuffle(inputs)
        for index in sorted(inputs, key=lambda i: -sizes[i]):
            seen += sizes[index]
            if abs(given + sizes[index] - share * seen) < abs(given - share * seen):
                n_open[index] += 1
                given += sizes[index]
        # Rounding added up on the way; give or take single inputs as long as that comes nearer.
        missing = share * seen - given
        while sizes:
            change, place = min((abs(missing - _flip(n_open[i] > lower, sizes[i])), p) for p, i in enumerate(inputs))
            index = inputs[place]
            if change >= abs(missing) - 1e-9 * seen:
                break
            missing -= _flip(n_open[index] > lower, sizes[index])
            n_open[index] = 2 * lower + 1 - n_open[index]
        return n_open


def _flip(upper: bool, size: int) -> int:
    """What the sum of upper inputs gains if one goes over to the other depth."""
    return -size if upper else size
