"""What a phase takes of memory; and what the comparison does, with the whole model on the device or one block of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mobiq_lightning.calibration.planning.sizes import ModelSizes, groups_of
from mobiq_lightning.evaluation import RTN_BITS
from mobiq_lightning.nn import kept_limit
from mobiq_lightning.runs import CONTROLS

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration
    from mobiq_lightning.sources import TextWindows

LIBRARIES = 650_000_000
"""Bytes of the process with all libraries loaded and at work, without a model: measured on Linux without a GPU."""
ACTIVATIONS = 30
"""Tensors as wide as the model that a training pass keeps of each token in a block."""
COMPARED = 6
"""Tensors of logits, float32, that the comparison keeps of a batch."""


@dataclass(frozen=True)
class PhaseMemory:
    """What a phase takes at its peak.

    Args:
        name: The phase.
        host: Bytes of the process on the host.
        device: Bytes on the device; 0 where that is the host.
        tables: Bytes of hidden states among them, wherever they lie.
        whole: Where the phase goes one block at a time, since the device has too little memory for more: bytes that it would take
            with the whole model there. Else 0.
        optional: Whether a run goes on without it where the device has too little memory.
    """

    name: str
    host: int
    device: int
    tables: int = 0
    whole: int = 0
    optional: bool = False

    def by_block(self, sizes: ModelSizes, device: str, free: int) -> str:
        """Says that the phase goes one block at a time, why, and what that costs.

        Args:
            sizes: Sizes of the model.
            device: Name of the device.
            free: Bytes that are free there.
        """
        moved = sizes.block_weights * sizes.itemsize + planes_bytes(sizes)
        return (
            f"{self.name}: the whole model would take about {self.whole / 1e9:.1f} GB on {device}, of which {free / 1e9:.1f} GB "
            f"are free, so one block at a time is there ({self.device / 1e9:.1f} GB in all). That is slower: {moved / 1e9:.1f} "
            "GB come from the host twice a batch, and a larger data.eval_batch_size makes fewer of them. Speed is not measured"
        )


def comparison_memory(
    sizes: ModelSizes, module: ElasticCalibration, text: TextWindows, device: str, free: int | None
) -> PhaseMemory:
    """What the comparison takes: with the whole model on the device, or one block of it where that is more than what is free.

    Args:
        sizes: Sizes of the model.
        module: What the recipe says of the comparison.
        text: What it says of the text.
        device: Type of the device that computes.
        free: Bytes that are free on that device, if it is another than the host and that is known.
    """
    outside = sizes.model_bytes - sizes.block_weights * sizes.itemsize
    kept = kept_in_comparison(sizes) if device == "cpu" else 0
    tokens = text.eval_batch_size * text.eval_seq_len
    step = 4 * (len(sizes.slice_bits) + 4) * sizes.largest_linear
    step += 4 * tokens * (COMPARED * sizes.vocabulary + ACTIVATIONS // 2 * sizes.width)
    checkpoint, host = outside + planes_bytes(sizes) + 20 * groups_of(sizes), LIBRARIES + sizes.model_bytes
    if device == "cpu":
        return PhaseMemory("comparison", host + checkpoint + kept + step, 0)
    whole = sizes.model_bytes + checkpoint + step
    # Planes lie there twice while they are brought into the kernels' order; hidden states and depths of all passes wait there.
    block = sizes.block_bytes + math.ceil((2 * planes_bytes(sizes) + 20 * groups_of(sizes)) / sizes.n_blocks)
    waiting = max(arms_of(module, sizes.slice_bits)) * tokens * (sizes.width * sizes.itemsize + 8 * sizes.n_inputs)
    by_block = 2 * outside + block + step + waiting
    if free is None or whole <= free or whole <= by_block:
        return PhaseMemory("comparison", host, whole)
    return PhaseMemory("comparison", host + checkpoint, by_block, whole=whole)


def planes_bytes(sizes: ModelSizes) -> int:
    """Bytes of the sliced weights of a checkpoint: their planes, and a scale and a bias for each group."""
    return sizes.sliced * sum(sizes.slice_bits) // 8 + 4 * groups_of(sizes)


def kept_in_comparison(sizes: ModelSizes) -> int:
    """Bytes of weights that the comparison keeps on a CPU."""
    all_depths = sizes.sliced * sizes.itemsize * len(sizes.slice_bits)
    return min(all_depths, kept_limit(all_depths))


def arms_of(module: ElasticCalibration, slice_bits: Sequence[int]) -> tuple[int, int]:
    """Passes of each batch through a model, in the first and in the second part of the comparison.

    Args:
        module: Says at which budgets and with which seeds.
        slice_bits: Bits of the slices: at the lowest and the highest depth controls read what the router reads.
    """
    once = sum(1 for control in CONTROLS if control in ("static", "layers"))
    mixed = sum(1 for bits in module.eval_bits if slice_bits[0] < bits < sum(slice_bits))
    first = 1 + len(RTN_BITS) + len(module.eval_bits)
    return first, 1 + mixed * (once + (len(CONTROLS) - once) * len(module.random_seeds))
