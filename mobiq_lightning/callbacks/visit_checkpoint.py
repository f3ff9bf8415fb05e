"""Keeps the training checkpoint from which a block that fails is started anew."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.callbacks.base import CalibrationCallback


class VisitCheckpoint(CalibrationCallback, ModelCheckpoint):
    """Saves when a block, or a stage of the whole model, is done: visits need not be equally long."""

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Saves after the last epoch of a visit, unless that is the only one and saved anyway."""
        if module.schedule.ends_visit(module.current_epoch) and len(module.segment.visit) > 1:
            super().on_train_epoch_end(trainer, module)
