"""What a strategy must be: the abstract bases of slice schemes, routers, budget schedules and objectives.

The base of transforms is in `transform_base`; what only some schemes and routers can do is in `abilities`.

Letters in shapes: B sequences, T tokens, H hidden, S slices, O/I out/in features, G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from mobiq_lightning.errors import shown
from mobiq_lightning.packing import PackedSlices, PackedWeight, depths_of
from mobiq_lightning.strategies.thresholds import ThresholdTask, prefix_scores, threshold_for_budget

DEFAULT_SLICE_BITS = (2, 1, 1, 2, 2)
"""Bits of each slice, coarsest first, where a recipe names none: depths of 2, 3, 4, 6 and 8 bits."""


class SliceScheme(nn.Module, ABC):
    """How one weight matrix is cut into slices. Its parameters are what is learned of that weight.

    Args:
        out_features: Rows of the weight, O.
        in_features: Columns of the weight, I.
        slice_bits: Bits of each slice, coarsest first.
    """

    code: ClassVar[str] = PackedSlices.code
    """Name of the code that `pack` stores the weight in, one of `packing.CODES`."""

    def __init__(self, out_features: int, in_features: int, slice_bits: Sequence[int]) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.slice_bits = tuple(slice_bits)
        if not self.slice_bits or any(type(b) is not int or b < 1 for b in self.slice_bits):
            raise ValueError(f"slice_bits ({shown(list(slice_bits))}) must be positive integers, coarsest slice first")
        if sum(self.slice_bits) > 8:
            raise ValueError(
                f"slice_bits ({shown(list(slice_bits))}) add up to {sum(slice_bits)}; at most 8 bits are stored"
            )

    @property
    def depths(self) -> tuple[int, ...]:
        """Bits read by the first 1, 2, ... S slices."""
        return depths_of(self.slice_bits)

    @abstractmethod
    def weight_at(self, weight: Tensor, n_slices: int) -> Tensor:
        """Gives the weight read with its first `n_slices` slices.

        It is differentiable in the parameters of the scheme. The gradient for the weight, which a transform may change
        while it is learned, passes straight through.

        Args:
            weight: (O, I) the full-precision weight.
            n_slices: Number of slices to read, 1 to S.

        Returns:
            (O, I) float32.
        """

    @abstractmethod
    def pack(self, weight: Tensor) -> PackedWeight:
        """Packs the weight for storage; its first planes, read back, equal `weight_at` bit by bit.

        Args:
            weight: (O, I) the full-precision weight.
        """

    def forward(self, weight: Tensor) -> Tensor:
        """Cuts the weight into slices, of which the first k add up to the weight read with k slices.

        Args:
            weight: (O, I) the full-precision weight.

        Returns:
            (S, O, I) float32.
        """
        prefixes = self.prefixes(weight)
        return torch.cat([prefixes[:1], prefixes[1:] - prefixes[:-1]])

    def prefixes(self, weight: Tensor) -> Tensor:
        """Gives the weight read with 1, 2, ... S slices, (S, O, I) float32; schemes may override it for speed."""
        return torch.stack([self.weight_at(weight, k + 1) for k in range(len(self.slice_bits))])

    def forget(self) -> None:
        """Drops what is kept of the weight between calls and can be computed again; called when a block is done."""

    def resized_tensors(self) -> list[str]:
        """Names of the scheme's parameters and buffers whose sizes change while they are trained."""
        return []

    def bound_clipping(self) -> None:
        """Narrows ranges that are wider than the weights of their group, in place; does nothing without ranges."""


class Router(nn.Module, ABC):
    """Scores the tokens of one input; a slice is read for a token if its score is above the threshold.

    A plug-in writes `scores`; the rest follows. The base slice is always read, and a slice only if all coarser
    ones are (a residual without its predecessors means nothing).

    Args:
        in_features: Features of the routed input, I.
        n_slices: Number of slices, S.
    """

    per_token = True
    """Whether tokens of one input may read different depths at one threshold."""

    deployable = True
    """Whether the router costs less than the weights that it routes. One that does not is an upper bound for others,
    and every table says so."""

    needs_model_stage: ClassVar[bool] = False
    """Whether it learns end to end only; a recipe then needs a stage with `scope: model` that trains routers."""

    threshold: Tensor
    """Threshold that scores must exceed: a scalar, or (B, 1, 1) if every row of a batch has a budget of its own. It is
    not saved, since the position of the dial is no part of a checkpoint."""

    def __init__(self, in_features: int, n_slices: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.n_slices = n_slices
        self.temperature = 1.0
        self.register_buffer("threshold", torch.zeros(()), persistent=False)

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """Scores how much each token needs each slice after the first.

        Args:
            x: (..., I) the input of the linears that share this router.

        Returns:
            (..., S - 1) scores, any real numbers.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Decides which slices each token reads, at the router's own threshold.

        Args:
            x: (..., I) the tokens.

        Returns:
            (..., S) gates: 1 where the slice is read, else 0. In training the backward pass sees a sigmoid of the score
            over the threshold, of width `temperature`.
        """
        return self.gates(self.scores(x), self.threshold)

    def bounded(self, scores: Tensor) -> Tensor:
        """Squashes scores (..., S - 1) into (-S, S) by tanh, in the same order, as soft gates see them in training.

        The gradient vanishes near the bounds, so the score of a gate that is always open cannot grow without end.
        """
        return self.n_slices * torch.tanh(scores / self.n_slices)

    def gates(self, scores: Tensor, threshold: Tensor, opened: Tensor | None = None) -> Tensor:
        """Opens the gates of slices whose score, under the prefix rule, is above a threshold.

        Args:
            scores: (..., S - 1) scores of the tokens.
            threshold: Threshold that broadcasts against the scores.
            opened: (..., S - 1) which gates are open, if that is decided already; by default those above the threshold.

        Returns:
            (..., S) gates, 1 where a slice is read, else 0; the base slice is always read.
        """
        above = prefix_scores(scores) - threshold
        hard = (above > 0 if opened is None else opened).to(scores.dtype)
        if self.training and torch.is_grad_enabled():
            soft = torch.sigmoid(above / self.temperature)
            hard = hard + soft - soft.detach()
        return torch.cat([hard.new_ones(*hard.shape[:-1], 1), hard], dim=-1)

    def two_layers(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Weights of a router of the form ``score(silu(hidden([x / rms(x), log rms(x)])))``; None for any other.

        The kernels run such a router in the launch that prepares the tokens. Any other router runs in front of it.

        Returns:
            Weight (H, I + 1) and bias (H,) of the hidden layer, weight (S - 1, H) and bias (S - 1,) of the scores.
        """
        return None

    def reseed(self, key: int) -> None:
        """Makes what is random in this router a function of `key`. Routers without randomness ignore it."""

    def place(self, position: int, count: int) -> None:
        """Tells the router that its input is number `position` of the `count` routed inputs of the model."""

    @classmethod
    def thresholds_for(cls, task: ThresholdTask) -> Tensor:
        """Computes the thresholds of all inputs of a model at which their average depth meets each budget.

        A router that knows its thresholds without looking at scores overrides this.

        Args:
            task: The scores of calibration tokens, the sizes of the inputs, and the budgets to meet.

        Returns:
            (inputs, budgets) float32 thresholds.
        """
        if task.scope == "layer":
            return torch.stack([threshold_for_budget(s, task.slice_bits, task.budgets) for s in task.scores])
        weights = torch.cat([s.new_full((s.shape[0],), size) for s, size in zip(task.scores, task.sizes, strict=True)])
        pooled = threshold_for_budget(torch.cat(list(task.scores)), task.slice_bits, task.budgets, weights)
        return pooled.expand(len(task.scores), -1).clone()


class BudgetSchedule(ABC):
    """The average bits asked for while a block is calibrated, as a function of the progress through the block."""

    def __call__(self, progress: float) -> float:
        """Average bits per weight at `progress` in [0, 1].

        Raises:
            ValueError: If `progress` lies outside [0, 1].
        """
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress ({progress}) must lie in [0, 1]")
        return self.bits_at(progress)

    @abstractmethod
    def bits_at(self, progress: float) -> float:
        """Average bits per weight at `progress`, which is in [0, 1]. Must depend on nothing else."""

    @property
    def final_bits(self) -> float:
        """Average bits at which a calibrated block feeds the next one."""
        return self.bits_at(1.0)

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest bits that the schedule can ask for."""


class BlockRun(Protocol):
    """What an objective sees of the block being calibrated, on one batch of calibration windows.

    In stages of the whole model, "the block" is the model and outputs are logits (B, T, V), V entries of the
    vocabulary.
    """

    target: Tensor
    """(B, T, H) output of the full-precision block on full-precision inputs."""

    depths: dict[int, float] | None
    """Fixed depths in the loss of the stage, in bits, with their weights; None for those of the objective."""

    @property
    def input_ids(self) -> Tensor | None:
        """Token ids (B, T) in stages of the whole model, whose outputs are logits; None in stages of blocks."""

    def at_depth(self, bits: int) -> Tensor:
        """Gives the output (B, T, H) of the sliced block with weights read at `bits`, on the inputs of that depth."""

    def routed(self, target_bits: float, meet_exactly: bool) -> tuple[Tensor, Tensor]:
        """Gives the output (B, T, H) of the routed block and the average bits (scalar) that its gates spent.

        Args:
            target_bits: Budget, in average bits per weight.
            meet_exactly: Whether each input's threshold is the quantile of the current scores at which its average is
                `target_bits`; otherwise the threshold is 0 and the average is whatever the scores give.
        """

    def auxiliary_target(self, bits: int) -> Tensor:
        """Gives the output (B, T, H) of the full-precision block on the inputs of depth `bits`."""


class Objective(ABC):
    """What a block, or the whole model, is trained to match."""

    @property
    @abstractmethod
    def depths(self) -> tuple[int, ...]:
        """Fixed depths, in bits, that the objective reads; each gets an input stream of its own."""

    @abstractmethod
    def __call__(self, run: BlockRun, target_bits: float, train_routers: bool) -> dict[str, Tensor]:
        """Computes the terms of the loss on one batch.

        Args:
            run: The block on this batch.
            target_bits: Budget asked for at this step, in average bits per weight.
            train_routers: Whether this stage trains routers; if not, only the fixed depths count.

        Returns:
            Scalar tensors by name. ``"loss"`` is minimized; the others are logged.
        """
