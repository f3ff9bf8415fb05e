"""Control: the tokens that read more are drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from mobiq_lightning.strategies.allocation import level_scores, split_budget
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.thresholds import ThresholdTask


class RandomRouter(Router):
    """Each token of each input reads one of the two depths around the budget, drawn independently.

    Draws depend on the seed, the input's place in the model and the key last given to `reseed`, never on the global
    random state.

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.
        seed: Seed of the draws.

    Example:
        ``router: {class_path: RandomRouter, init_args: {seed: 0}}``
    """

    def __init__(self, in_features: int, n_slices: int, seed: int = 0) -> None:
        super().__init__(in_features, n_slices)
        self.seed = seed
        self.position = 0
        self.generator = torch.Generator()
        self.reseed(0)

    def place(self, position: int, count: int) -> None:
        """Remembers the position of the input in the model, which seeds draws of its own, and begins them anew."""
        self.position = position
        self.reseed(0)

    def reseed(self, key: int) -> None:
        """Makes the draws to come a function of `key`, the seed and the position of the input."""
        mixed = hash((self.seed, self.position, key))  # of integers only: the same in every process
        self.generator.manual_seed(mixed & 0x7FFF_FFFF_FFFF_FFFF)

    def scores(self, x: Tensor) -> Tensor:
        """Scores (..., S - 1) for tokens `x` (..., I): 0, -1, -2, ... plus one random number in [0, 1) per token."""
        draw = torch.rand(x.shape[:-1], generator=self.generator).to(x.device)
        return level_scores(self.n_slices, x.device) + draw.unsqueeze(-1)

    @classmethod
    def thresholds_for(cls, task: ThresholdTask) -> Tensor:
        """Computes thresholds that meet each budget on average, without looking at scores, since draws are uniform.

        Args:
            task: The number of inputs and the budgets to meet.

        Returns:
            (inputs, budgets) float32 thresholds.
        """
        splits = [split_budget(task.slice_bits, bits) for bits in task.budgets]
        return torch.tensor([[1.0 - share - lower for lower, share in splits]] * len(task.sizes))
