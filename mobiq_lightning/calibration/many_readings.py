"""Passes of one batch through a model that is larger than its device: all of them go through a block while it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.nn import OneBlockAtATime


class ManyReadings:
    """Reads a batch in many ways at once, so that each block comes to the device once for all of them.

    Args:
        model: Causal language model whose blocks come to the device one at a time.
        blocks: Its decoder blocks.
        comes: Brings them.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], comes: OneBlockAtATime) -> None:
        self.blocks, self.comes = blocks, comes
        self.caller = _HeldBlocks(model, blocks, comes.device)

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, readings: Sequence[Callable[[int], AbstractContextManager[Any]]]
    ) -> Iterator[Tensor]:
        """Gives the logits (B, T, V) of each reading, one after the other, once all blocks are passed.

        Args:
            input_ids: (B, T) tokens on the device.
            readings: For each, how a block (by index) is read; entered when the block is on the device.
        """
        if not readings:
            return
        with self.comes.none():
            hidden = [self.caller.embed(input_ids)] * len(readings)
        for index, block in enumerate(self.blocks):
            with self.comes.held(block):
                for number, reading in enumerate(readings):
                    with reading(index):
                        hidden[number] = self.caller.call(index, hidden[number])
        while hidden:
            yield self._logits(input_ids, hidden.pop(0))

    def _logits(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        with self.comes.none(), self.caller.after_blocks() as logits_of:
            return logits_of(input_ids, hidden)


class _HeldBlocks(BlockCaller):
    """Calls blocks that somebody else brings to the device."""

    def bring(self, index: int) -> None:
        """Leaves the block where it is."""
