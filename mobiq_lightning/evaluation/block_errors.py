"""Measures how far each elastic block alone is from the full-precision one, at every depth of the slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from mobiq_lightning.nn import Borrowed, fixed_depth, routed_inputs
from mobiq_lightning.strategies.objectives.block_reconstruction import relative_error


class BlockErrors(Metric):
    """Metric of the relative error of each decoder block's output on full-precision inputs, at each depth.

    Errors are means over tokens.
    Each block is given what the full-precision block is given, so errors of the blocks before it do not count.

    Args:
        full: Decoder blocks of the full-precision model.
        elastic: Decoder blocks of the elastic model, in the same order.
        depths: Depths in bits, ascending.
        basis: (H, H) orthogonal matrix that turns the residual stream of the full-precision model into that of the
            elastic one, as `residual_basis` finds it; None if they are the same. Being orthogonal, it leaves errors as
            they are.
    """

    full_state_update = False
    error: Tensor
    count: Tensor

    def __init__(
        self,
        full: Sequence[nn.Module],
        elastic: Sequence[nn.Module],
        depths: Sequence[int],
        basis: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.basis = basis
        pairs = tuple(zip(full, elastic, [routed_inputs(block) for block in elastic], strict=True))
        self._pairs = Borrowed(pairs)  # the models are the comparison's, not the metric's to move
        self.depths = tuple(depths)
        shape = (len(pairs), len(self.depths))
        self.add_state("error", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        """Runs the full-precision model on a batch, and each elastic block beside its counterpart.

        Args:
            model: The full-precision model that holds the blocks.
            ids: (B, T) tokens.
            mask: (B, T) bool, which tokens count.
        """
        handles = [
            block.register_forward_hook(self._beside(number, mask), with_kwargs=True)
            for number, (block, _, _) in enumerate(self._pairs.value)
        ]
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.count += mask.sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Relative errors (blocks, depths) float64, and the number of tokens that they are means over."""
        return self.error / self.count, self.count

    def _beside(self, number: int, mask: Tensor) -> Any:
        """A hook that reads elastic block `number` at every depth on what the full-precision one was given."""
        _, elastic, inputs = self._pairs.value[number]

        def measure(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
            target = self._turned(_hidden(output))[mask]
            turned = (self._turned(hidden), *rest)
            for position, depth in enumerate(self.depths):
                with fixed_depth(inputs, depth):
                    error = relative_error(_hidden(elastic(*turned, **kwargs))[mask], target)
                self.error[number, position] += error.double() * len(target)

        return measure

    def _turned(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, H) of the full-precision model in the basis of the elastic one."""
        return hidden if self.basis is None else (hidden.to(self.basis.dtype) @ self.basis).to(hidden.dtype)


def residual_basis(full: Any, elastic: Any) -> Tensor | None:
    """Finds the matrix (H, H) float32 that turns the residual stream of a model into that of another made from it.

    A rotation that is folded into weights turns the embeddings too, so the matrix is solved for from the two
    embeddings.

    Args:
        full: The full-precision model.
        elastic: The elastic model made from it.

    Returns:
        The matrix, or None if the embeddings are equal, so that nothing was turned.
    """
    one, other = (model.get_input_embeddings().weight.detach() for model in (full, elastic))
    if torch.equal(one, other):
        return None
    found: Tensor = torch.linalg.lstsq(one.double().cpu(), other.double().cpu()).solution
    return found.to(one.device, torch.float32)


def _hidden(output: Any) -> Tensor:
    """The hidden states (B, T, H) among what a decoder block returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
