"""The callbacks, loggers and checkpoint writers that every run has beside those that its recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from mobiq_lightning.callbacks import (
    BlockExport,
    BlockStore,
    CalibrationProgress,
    Guards,
    LatencyCheck,
    LayerGains,
    LayerwiseCalibration,
    Results,
    RoutingDiagnostics,
    ThresholdTuning,
)
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.callbacks.visit_checkpoint import EpochCheckpoint, VisitCheckpoint
from mobiq_lightning.loggers import JsonlLogger, WandbLogger
from mobiq_lightning.runs import CHECKPOINTS, CSV_LOG, RunFolder

_AFTER_BLOCKS = (LayerGains, ThresholdTuning, BlockExport, RoutingDiagnostics, Results, LatencyCheck)
"""Callbacks that work on the whole model when its blocks are calibrated."""


def callbacks_of_run(
    given: Sequence[Callback], folder: RunFolder, progress: bool, blocks: range | None = None
) -> list[Callback]:
    """All callbacks of a run, in the order in which they are called.

    Args:
        given: Those that the recipe names; one of a class that every run has takes its place.
        folder: The run folder.
        progress: Whether progress is shown.
        blocks: The blocks, by index, that are calibrated alone; None: all, and what follows.
    """
    own: list[Callback] = [
        LayerwiseCalibration(),
        Guards(),
        LayerGains(),
        ThresholdTuning(),
        BlockExport(),
        *([CalibrationProgress()] if progress else []),
        # A run with results counts as finished, so they are written when all else is.
        RoutingDiagnostics(),
        Results(),
        LatencyCheck(),
    ]
    named = {type(callback) for callback in given}
    found = [*given, *(callback for callback in own if type(callback) not in named)]
    if blocks is None:
        found += _training_checkpoints(folder.path)
    else:
        found = [callback for callback in found if not isinstance(callback, _AFTER_BLOCKS)]
        found += [BlockStore(), *_training_checkpoints(folder.blocks.work_folder(blocks))]
    return sorted(found, key=lambda callback: getattr(callback, "order", CalibrationCallback.order))


def _training_checkpoints(folder: Path) -> list[ModelCheckpoint]:
    """The last two epochs, and the last finished block, from which a block that fails is started anew."""
    common: dict[str, Any] = {
        "dirpath": folder / CHECKPOINTS,
        "monitor": "step",
        "mode": "max",
        "auto_insert_metric_name": False,
        "save_on_train_epoch_end": True,
    }
    last = EpochCheckpoint(filename="epoch-{epoch:06d}", save_top_k=2, **common)
    return [last, VisitCheckpoint(filename="block-epoch-{epoch:06d}", **common)]


def loggers_of_run(given: Any, folder: Path, recipe: dict[str, Any]) -> list[Logger]:
    """All loggers of a run: CSV first, then the journal, then what the recipe asks for.

    Args:
        given: `trainer.logger` of the recipe: a logger, several, or whether there are any.
        folder: Where they write: the run folder, or that of a process with blocks of its own.
        recipe: The full recipe, which W&B shows.
    """
    more = [] if given in (None, True, False) else (given if isinstance(given, list) else [given])
    for logger in more:
        if isinstance(logger, WandbLogger):
            logger.use_folder(folder)
            logger.log_recipe(recipe)
    return [CSVLogger(folder, name=CSV_LOG), JsonlLogger(folder), *more]
