"""What is said when a calibration meets NaN or infinity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mobiq_lightning.calibration.block_batch import BlockBatch
from mobiq_lightning.strategies.base import BlockRun

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration


def describe_non_finite(module: ElasticCalibration, batch_idx: int, terms: dict[str, Tensor], run: BlockRun) -> str:
    """Where a loss that is not finite was met, its terms, the learning rates, and what else is not finite.

    Args:
        module: The calibration, in the step that failed.
        batch_idx: The number of the step in its epoch, from 0.
        terms: The terms of the loss, scalars by name.
        run: What the objective saw of the batch.
    """
    bad = ", ".join(f"{name} = {value.item()}" for name, value in terms.items() if not torch.isfinite(value))
    named = [item for calibrated in module.blocks_in_training() for item in calibrated.named_parameters()]
    broken = [name for name, p in named if not bool(torch.isfinite(p).all())]
    largest = ""
    if isinstance(run, BlockBatch) and run.hidden.inputs:
        value = max(float(run.inputs(name).abs().max()) for name in run.hidden.inputs)
        largest = f" Largest input of the block: {value:.4g}."
    rates = ", ".join(f"{g['name']} {g['lr']:.2g}" for g in module.trainer.optimizers[0].param_groups)
    block = module.block_index
    place = "the whole model" if block is None else f"block {block + 1}/{len(module.blocks)}"
    return (
        f"{place}, epoch {module.current_epoch - module.segment.visit.start + 1}, step {batch_idx + 1}: {bad}. Learning "
        f"rates: {rates}.{largest} Learned values that are not finite: {', '.join(broken[:3]) or 'none'}"
    )
