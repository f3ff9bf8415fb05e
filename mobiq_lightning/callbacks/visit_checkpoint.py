"""Keeps training checkpoints: of the last epochs, and of the last visit, from which a block that fails is started anew."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.callbacks.base import CalibrationCallback


class EpochCheckpoint(CalibrationCallback, ModelCheckpoint):
    """Saves after every epoch; of those of a block that was taken over from another process, after the last one."""

    @property
    def state_key(self) -> str:
        """The name of its state in training checkpoints: that of Lightning's own, which runs of earlier versions have."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Saves, if something has changed."""
        if not module.walks or module.schedule.ends_visit(module.current_epoch):
            super().on_train_epoch_end(trainer, module)


class VisitCheckpoint(CalibrationCallback, ModelCheckpoint):
    """Saves when a block, or a stage of the whole model, is done: visits need not be equally long."""

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Saves after the last epoch of a visit, unless that is the only one and saved anyway."""
        if module.schedule.ends_visit(module.current_epoch) and len(module.segment.visit) > 1:
            super().on_train_epoch_end(trainer, module)
