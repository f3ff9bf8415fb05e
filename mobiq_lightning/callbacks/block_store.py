"""Leaves each block that a process calibrates by itself in the run folder, for the fit that makes the checkpoint of all."""

from __future__ import annotations

from lightning.pytorch import Trainer

from mobiq_lightning.calibration import ElasticCalibration, checkpoint_writer, write_block_file
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.callbacks.layerwise_calibration import identity_of
from mobiq_lightning.console import say


class BlockStore(CalibrationCallback):
    """Writes a block when its visit ends, in place of `BlockExport`, where `fit --blocks` asks for some blocks alone."""

    def on_fit_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Refuses a source model that no checkpoint can be made of, before hours are spent on it."""
        checkpoint_writer(module)

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Writes the block whose last epoch this was."""
        block = module.block_index
        if block is not None and not module.walks and module.schedule.ends_visit(module.current_epoch):
            path = write_block_file(module, block, identity_of(module))
            say(f"Block {block + 1}/{len(module.blocks)} is calibrated: {path}.")
