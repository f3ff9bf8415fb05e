"""Shared by the routers that give all tokens of an input the same depth, chosen by what the input's slices are worth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mobiq_lightning.strategies.allocation import concave_rates, nested_depths
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.thresholds import ThresholdTask, threshold_for_budget

_LEAST_RATE = 1e-30  # nats per token, bit and weight; a slice that gains nothing comes last
_SEPARATE = 1e-5  # scores that differ by less have no threshold between them in float32
_WINDOW = 0.02  # bits by which a budget may be missed where that gains more
_INSIDE = 0.25  # share of the distance between two scores by which a threshold keeps away from both


class LayerRouter(Router):
    """A router whose scores are the same for all tokens of an input: it allocates bits to layers, not to tokens.

    Budgets are met over all inputs together, whatever the scope of thresholds, as nearly as whole inputs allow.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.
    """

    per_token = False

    @abstractmethod
    def layer_scores(self) -> Tensor:
        """Scores (S - 1,) float32: what each slice of this input is worth per bit, comparable between inputs."""

    @staticmethod
    def worth_per_bit(scores: Tensor) -> Tensor:
        """Turns scores, of any shape, into the worth of a bit, which adds up over inputs; by default the scores."""
        return scores

    def scores(self, x: Tensor) -> Tensor:
        """Repeats the scores of this input for every token: (..., S - 1) for tokens `x` (..., I)."""
        return self.layer_scores().float().expand(*x.shape[:-1], -1)

    @classmethod
    def thresholds_for(cls, task: ThresholdTask) -> Tensor:
        """Computes thresholds at which the average over the weights of all inputs meets each budget.

        Thresholds fall with the budget, and lie as near to the one threshold for all inputs as the depths allow.

        Args:
            task: Scores and sizes of the inputs, and the budgets to meet.

        Returns:
            (inputs, budgets) float32 thresholds.
        """
        scores, sizes, slice_bits, budgets = task.scores, task.sizes, task.slice_bits, task.budgets
        table = torch.zeros(len(scores), len(budgets))
        if len(slice_bits) == 1:
            return table
        one = torch.stack([s[0].detach().float().cpu() for s in scores])  # (inputs, S - 1); all tokens have the same
        worth = cls.worth_per_bit(one.double()) * torch.tensor(slice_bits[1:]) * torch.tensor(sizes)[:, None]
        worth = torch.cat([torch.zeros(len(scores), 1, dtype=worth.dtype), worth.cumsum(1)], dim=1)
        allowed = torch.ones(worth.shape, dtype=torch.bool)
        allowed[:, 1:-1] = one[:, :-1] - one[:, 1:] > _SEPARATE * one.abs().max()
        depths = nested_depths(worth, sizes, slice_bits, budgets, allowed, _WINDOW)
        common = threshold_for_budget(one, slice_bits, budgets, torch.tensor(sizes, dtype=torch.float64))
        edges = torch.cat([one[:, :1] + 1.0, one, one[:, -1:] - 1.0], dim=1)
        rows = torch.arange(len(scores))
        for column, n_open in enumerate(depths):
            closed, opened = edges[rows, torch.tensor(n_open) + 1], edges[rows, torch.tensor(n_open)]
            margin = _INSIDE * (opened - closed)
            table[:, column] = common[column].clamp(closed + margin, opened - margin)
        return table


class GainRouter(LayerRouter):
    """Scores slices by the logarithm of what they gain per bit and weight, as measured on the calibrated model.

    Where a fine slice gains more per bit than a coarser one, both get the gain per bit of the two together.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.
    """

    rates: Tensor

    def __init__(self, in_features: int, n_slices: int) -> None:
        super().__init__(in_features, n_slices)
        # Until it is measured, slices open one after the other, all inputs alike.
        self.register_buffer("rates", torch.logspace(0, 1 - (n_slices - 1), n_slices - 1))

    @staticmethod
    def worth_per_bit(scores: Tensor) -> Tensor:
        """Turns scores of any shape, which are logarithms, back into rates: nats per token, bit and weight."""
        return scores.exp()

    @torch.no_grad()
    def observe_gains(self, gains: Tensor, slice_bits: Sequence[int], n_weights: int) -> None:
        """Keeps the gains (S - 1,) of the slices, in nats per token, as rates (S - 1,) per bit and weight."""
        rates = concave_rates(gains.tolist(), slice_bits)
        self.rates.copy_(torch.tensor(rates) / n_weights)

    def log_rates(self) -> Tensor:
        """Logarithms (S - 1,) of the rates of the slices after the first, in nats per token, bit and weight."""
        return self.rates.clamp_min(_LEAST_RATE).log()
