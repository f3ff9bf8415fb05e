"""The whole model on one batch, as objectives of model stages see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mobiq_lightning.nn import (
    FixedSlices,
    RoutedInput,
    common_threshold,
    fixed_depth,
    full_precision,
    meet_budget,
    read_as,
    record_gates,
    record_live_scores,
)
from mobiq_lightning.sources import check_output
from mobiq_lightning.strategies.thresholds import threshold_for_budget, with_budget_gradient
from mobiq_lightning.strategies.together import gathered


class ModelBatch:
    """What an objective sees of the whole model, on one batch: a `BlockRun` whose outputs are logits (B, T, V).

    Args:
        model: The source model with sliced linears, all on one device.
        blocks: The decoder blocks of the model.
        inputs: The routed inputs of the model.
        input_ids: (B, T) calibration windows.
        depths: Fixed depths in the loss, in bits, with their weights; None: those of the objective.
        recompute: Compute the inside of each block again in the backward pass instead of keeping it (gradient
            checkpointing): one forward pass more, and the memory of one block instead of all.

    Raises:
        ModelError: If the full-precision model gives logits that are not finite.
    """

    def __init__(
        self,
        model: Any,
        blocks: Sequence[nn.Module],
        inputs: Sequence[RoutedInput],
        input_ids: Tensor,
        depths: dict[int, float] | None = None,
        recompute: bool = False,
    ) -> None:
        self._mixed: dict[int, list[FixedSlices]] = {}
        self.model, self.blocks, self.inputs, self.input_ids = model, blocks, inputs, input_ids
        self.depths, self.recompute = depths, recompute
        with torch.no_grad(), full_precision(inputs):
            self.target: Tensor = model(input_ids=input_ids, use_cache=False).logits
            check_output(self.target, model, lambda: model(input_ids=input_ids, use_cache=False), "the whole model")

    def mix(self, bits: int, n_slices: Sequence[int]) -> None:
        """Has each input read a number of slices of its own where the objective asks for a depth in `bits`."""
        self._mixed[bits] = [FixedSlices(count) for count in n_slices]

    def at_depth(self, bits: int) -> Tensor:
        """(B, T, V) logits with all weights read at `bits`, or as `mix` has set in its place."""
        if bits in self._mixed:
            return self._logits(partial(read_as, self.inputs, self._mixed[bits]))
        return self._logits(partial(fixed_depth, self.inputs, bits))

    def routed(self, target_bits: float, meet_exactly: bool) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of the routed model and the average bits (scalar) that its gates spent.

        One threshold serves all inputs: the quantile of their pooled scores, weighted by parameters. Scores depend on how
        deep the blocks before read, so two passes without gradients come first: one with each input at the budget, which
        gives a threshold, and one at that threshold, whose scores decide which gates open. The budget is met exactly; the
        scores of the second pass give the threshold its gradient, so that scores compete.

        Args:
            target_bits: The budget.
            meet_exactly: Always done here.
        """
        threshold, opened = self._decide(target_bits)
        with record_gates(self.inputs) as records:
            logits = self._logits(partial(common_threshold, self.inputs, threshold, opened))
        sizes = torch.tensor([float(routed.n_weights) for routed in self.inputs], device=logits.device)
        used = torch.stack([record[0].float().mean() for record in records])
        return logits, (used * sizes).sum() / sizes.sum()

    def auxiliary_target(self, bits: int) -> Tensor:
        """The target, logits (B, T, V), whatever the depth: the model has one input."""
        return self.target

    def _decide(self, target_bits: float) -> tuple[Tensor, list[Tensor]]:
        """The common threshold (scalar) with its gradient, and for each input which gates (B, T, S - 1) open."""
        with torch.no_grad():
            with meet_budget(self.inputs, target_bits, together=True):
                scores = self._scores()
            with common_threshold(self.inputs, self._threshold(scores, target_bits)[0]):
                scores = self._scores()
        bounded = [routed.router.bounded(s) for s, routed in zip(scores, self.inputs, strict=True)]
        threshold, pooled, weights = self._threshold(bounded, target_bits)
        opened = [(s.detach() > threshold).unflatten(0, self.input_ids.shape) for s in bounded]
        first = self.inputs[0]
        arguments = (first.slice_bits, first.router.temperature, weights)
        return with_budget_gradient(threshold, pooled, *arguments, together=True), opened

    def _scores(self) -> list[Tensor]:
        """For each input, the scores (B * T, S - 1) of a pass, with gradients for its router."""
        with record_live_scores(self.inputs) as records:
            self.model(input_ids=self.input_ids, use_cache=False)
        return [record[0] for record in records]

    def _threshold(self, scores: Sequence[Tensor], target_bits: float) -> tuple[Tensor, Tensor, Tensor]:
        """The threshold (scalar) at which all inputs, and processes, together meet a budget; own scores, and their weights."""
        shares = [s.new_full((s.shape[0],), routed.n_weights) for s, routed in zip(scores, self.inputs, strict=True)]
        pooled, weights = torch.cat(list(scores)), torch.cat(shares)
        of_all = gathered(pooled), gathered(weights)
        return threshold_for_budget(of_all[0], self.inputs[0].slice_bits, [target_bits], of_all[1])[0], pooled, weights

    def _logits(self, reading: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        with reading(), ExitStack() as stack:
            if self.recompute and torch.is_grad_enabled():
                for block in self.blocks:
                    stack.enter_context(_recomputed(block, reading))
            logits: Tensor = self.model(input_ids=self.input_ids, use_cache=False).logits
        return logits


@contextmanager
def _recomputed(block: nn.Module, reading: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within it, the block keeps its input alone; the backward pass enters `reading` again, which has ended by then."""
    forward = block.forward

    def compute(*args: Any, **kwargs: Any) -> Any:
        run = partial(forward, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), reading()))

    block.forward = compute
    try:
        yield
    finally:
        del block.forward  # the class's own again
