"""Notices that a limit of the trainer, or another callback, ended a fit before its time."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.errors import CutShortError
from mobiq_lightning.runs import RunFolder


def check_epoch_is_whole(trainer: Trainer, module: ElasticCalibration) -> None:
    """Makes sure that an epoch has had all its steps, before anything is kept of it: a resume begins at an epoch.

    Raises:
        CutShortError: If it has not.
    """
    done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    if done < int(trainer.num_training_batches):
        raise _cut_short(
            trainer, module, module.current_epoch, f" and {done} of {int(trainer.num_training_batches)} steps"
        )


def check_fit_is_whole(trainer: Trainer, module: ElasticCalibration) -> None:
    """Makes sure that a fit has done all its epochs, before its checkpoint is exported.

    Raises:
        CutShortError: If it has not.
    """
    done = trainer.fit_loop.epoch_progress.current.completed
    if done < module.share.epochs(module.schedule).stop or getattr(trainer, "fast_dev_run", False):
        raise _cut_short(trainer, module, done, "")


def _cut_short(trainer: Trainer, module: ElasticCalibration, epochs: int, steps: str) -> CutShortError:
    kept = RunFolder(module.run_folder).epochs_kept
    return CutShortError(
        f"{_cause(trainer)} ended the run after {epochs} of {module.schedule.n_epochs} epochs{steps}. Nothing is exported; "
        f"epochs kept in {module.run_folder}: {kept}; the same command without that limit goes on after them"
    )


def _cause(trainer: Trainer) -> str:
    """What ended a fit, as the start of a sentence."""
    if getattr(trainer, "fast_dev_run", False):
        return "trainer.fast_dev_run"
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return f"trainer.max_steps ({trainer.max_steps})"
    if any(
        isinstance(callback, Timer) for callback in getattr(trainer, "callbacks", ())
    ):  # also what trainer.max_time makes
        return "a timer (trainer.max_time, or the callback Timer)"
    return "trainer.should_stop, which a callback has set,"
