"""Writes the elastic checkpoint: each block's shard when the block is done, the rest when all are."""

from __future__ import annotations

from lightning.pytorch import Trainer

from mobiq_lightning.calibration import ElasticCalibration, checkpoint_writer
from mobiq_lightning.callbacks.base import CalibrationCallback


class BlockExport(CalibrationCallback):
    """Writes blocks as they finish: nothing finished is lost, and saving needs no more memory than one block.

    A resumed run that calibrates a block again, bit for bit, writes its shard again.
    """

    def on_fit_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Refuses a source model that no checkpoint can be made of, before hours are spent on it."""
        if trainer.is_global_zero:
            checkpoint_writer(module)

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Writes the blocks whose last epoch this was."""
        if trainer.is_global_zero:
            for block in range(len(module.blocks)):
                if module.schedule.final_epoch(block) == module.current_epoch:
                    checkpoint_writer(module).write_block(block)
