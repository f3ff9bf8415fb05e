"""The block being calibrated, on one batch, as objectives see it."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.calibration.hidden_states import HiddenStates
from mobiq_lightning.nn import CalibratedBlock, fixed_depth, full_precision, meet_budget, record_gates
from mobiq_lightning.strategies.together import n_processes, summed

ROUTED = "routed"
"""Name of the input stream that goes through routed blocks; the others are named by their depth."""


class BlockBatch:
    """What an objective sees of the block being calibrated, on one batch: a `BlockRun`.

    Args:
        calibrated: What is learned of the block.
        block: Index of the block.
        caller: Calls the block.
        hidden: Tables of the inputs and targets of the block.
        index: (B,) numbers of the calibration windows of the batch.
        depths: Fixed depths in the loss, in bits, with their weights; None: those of the objective.
    """

    def __init__(
        self,
        calibrated: CalibratedBlock,
        block: int,
        caller: BlockCaller,
        hidden: HiddenStates,
        index: Tensor,
        depths: dict[int, float] | None = None,
    ) -> None:
        self.depths = depths
        self.input_ids: Tensor | None = None
        self.routed_inputs = calibrated.routed_inputs()
        self.block, self.caller, self.hidden, self.index = block, caller, hidden, index
        self.target = hidden.target_batch(index)
        self._auxiliary: dict[int, Tensor] = {}

    def inputs(self, name: str) -> Tensor:
        """(B, T, H) inputs of a stream."""
        return self.hidden.batch(name, self.index)

    def at_depth(self, bits: int) -> Tensor:
        """(B, T, H) output of the block with all weights read at `bits`, on the inputs of that depth."""
        with fixed_depth(self.routed_inputs, bits):
            return self.caller.call(self.block, self.inputs(str(bits)))

    def routed(self, target_bits: float, meet_exactly: bool) -> tuple[Tensor, Tensor]:
        """Output (B, T, H) of the routed block and the average bits (scalar) that its gates spent.

        Args:
            target_bits: The budget, average bits per weight.
            meet_exactly: Whether each input takes the threshold at which its average is `target_bits`; otherwise the threshold
                is 0, and the average is whatever the scores give. Tokens are those of all processes that train together.
        """
        with ExitStack() as stack:
            if meet_exactly:
                stack.enter_context(meet_budget(self.routed_inputs, target_bits, together=True))
            records = stack.enter_context(record_gates(self.routed_inputs))
            output = self.caller.call(self.block, self.inputs(ROUTED))
        sizes = torch.tensor([float(routed.n_weights) for routed in self.routed_inputs], device=output.device)
        used = torch.stack([record[-1].float().mean() for record in records])
        average = (used * sizes).sum() / sizes.sum()
        return output, average if meet_exactly else summed(average) / n_processes()

    def auxiliary_target(self, bits: int) -> Tensor:
        """(B, T, H) output of the full-precision block on the inputs of depth `bits`."""
        if bits not in self._auxiliary:
            with torch.no_grad(), full_precision(self.routed_inputs):
                self._auxiliary[bits] = self.caller.call(self.block, self.inputs(str(bits)))
        return self._auxiliary[bits]
