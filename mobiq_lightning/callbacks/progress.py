"""Shows how far a calibration is: block k of N, loss, bits, time left, memory."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.environment import format_seconds, peak_memory_gb
from mobiq_lightning.sources import ComparisonPass


class CalibrationProgress(CalibrationCallback, ProgressBar):
    """One bar over all blocks on a terminal; elsewhere one line per epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Any = None
        self._started = 0.0
        self._first_epoch = 0

    def disable(self) -> None:
        """Shows nothing; the trainer calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows progress after all; the trainer calls it on the first rank."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Starts the clock and, on a terminal, the bar."""
        self._started, self._first_epoch = time.monotonic(), module.current_epoch
        if self._enabled and sys.stderr.isatty():
            steps = int(trainer.num_training_batches)
            done = module.current_epoch * steps
            total = module.schedule.n_epochs * steps
            self._bar = tqdm(total=total, initial=done, dynamic_ncols=True, unit="step")

    def on_train_batch_end(
        self, trainer: Trainer, module: ElasticCalibration, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.set_description(self._place(module))
            self._bar.set_postfix_str(self._state(trainer, module))
            self._bar.update()

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Prints a line where there is no terminal."""
        if self._enabled and self._bar is None:
            segment = module.segment
            epoch = module.current_epoch - segment.span.start + 1
            done = module.current_epoch + 1 - self._first_epoch
            left = module.schedule.n_epochs - module.current_epoch - 1
            eta = (time.monotonic() - self._started) / done * left
            print(
                f"{self._place(module)}, epoch {epoch}/{len(segment.span)}, {self._state(trainer, module)}, "
                f"ETA {format_seconds(eta)}",
                file=sys.stderr,
                flush=True,
            )

    def on_train_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, trainer: Trainer, module: ElasticCalibration, exception: BaseException) -> None:
        """Closes the bar, so that the message starts on a line of its own."""
        self.on_train_end(trainer, module)

    def on_validation_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Starts the bar of the comparison."""
        total = sum(int(n) for n in trainer.num_val_batches)
        if self._enabled:
            hidden = not sys.stderr.isatty()
            self._bar = tqdm(total=total, desc="comparing", dynamic_ncols=True, unit="batch", disable=hidden)
            if hidden:
                count = total // len(ComparisonPass)
                said = f"comparing on {count} batch{'' if count == 1 else 'es'}, twice"
                print(said, file=sys.stderr, flush=True)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: ElasticCalibration,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Moves the bar of the comparison."""
        if self._bar is not None:
            self._bar.update()

    def on_validation_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Closes the bar of the comparison."""
        self.on_train_end(trainer, module)

    def _place(self, module: ElasticCalibration) -> str:
        segment = module.segment
        place = "whole model" if segment.block is None else f"block {segment.block + 1}/{len(module.blocks)}"
        if segment.stage.share is not None:
            return place
        depth = "" if segment.stage.depth is None else f" at {segment.stage.depth} bits"
        return f"stage {segment.number + 1}/{len(module.stages)} ({segment.stage.trained}{depth}), {place}"

    def _state(self, trainer: Trainer, module: ElasticCalibration) -> str:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        place = "model" if module.block_index is None else "block"
        loss = metrics.get(f"{place}/loss", float("nan"))
        bits = metrics.get(f"{place}/routed_bits") if module.stage.trains("routers") else None
        depth = module.stage.depth
        shown = f"{bits:.2f} bits" if bits is not None else "fixed depths" if depth is None else f"{depth} bits"
        return f"loss {loss:.4g}, {shown}, peak {peak_memory_gb():.1f} GB"
