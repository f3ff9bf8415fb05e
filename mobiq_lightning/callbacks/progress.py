"""Shows how far a run is: block k of N, loss, bits, the time that is left of all of it, memory."""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.calibration.planning import CONTROL_PASS, ROUTER_PASS, stage_name
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.callbacks.guards import PHASE as GUARDS
from mobiq_lightning.console import say, verbosity
from mobiq_lightning.environment import format_seconds, peak_memory_gb
from mobiq_lightning.sources import ComparisonPass

_BETWEEN_LINES, _BETWEEN_DRAWINGS = 20.0, 0.1
"""Seconds between two lines of one phase in a log, and between two drawings of the bar on a terminal."""
_PASSES = {ComparisonPass.ROUTER: ROUTER_PASS, ComparisonPass.CONTROLS: CONTROL_PASS}


class CalibrationProgress(CalibrationCallback, ProgressBar):
    """One bar over the whole run on a terminal; elsewhere a line per epoch, and from time to time in phases that have none.

    The time left is that of the whole run: text that the model writes, all stages, layer gains, thresholds, the comparison.
    """

    order = -25  # an epoch is done before what follows it begins

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Any = None
        self._shown = 0.0
        self._trains = False

    def disable(self) -> None:
        """Shows nothing; the trainer calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows progress after all; the trainer calls it on the first rank."""
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Has the clock of the run show what it is told."""
        super().setup(trainer, pl_module, stage)
        self._shown = time.monotonic()
        pl_module.clock.show = (
            partial(self._show, trainer, pl_module)
            if self._enabled and trainer.is_global_zero and verbosity() != "quiet"
            else None
        )

    def on_train_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Leaves out of the time what a resumed run has done before."""
        self._trains = True
        for number in range(len(module.stages)):
            module.clock.left.skip(stage_name(number), self._done(trainer, module, number, 0))
        module.clock.left.skip(GUARDS, module.schedule.visits_until(module.current_epoch - 1)[0])
        module.clock.restart()

    def on_train_batch_end(
        self, trainer: Trainer, module: ElasticCalibration, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the step."""
        number = module.segment.number
        done, of = self._done(trainer, module, number, batch_idx + 1), _epochs(module, number) * _batches(trainer)
        if module.walks:
            module.clock.skip(stage_name(number), done, of)
        else:
            module.clock.step(stage_name(number), done, of)

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Prints a line where there is no terminal."""
        if module.walks:
            return
        # On all ranks: the metrics of an epoch are gathered when they are first read.
        state = self._state(trainer, module)
        if self._enabled and not sys.stderr.isatty():
            segment = module.segment
            epoch = module.current_epoch - segment.span.start + 1
            self._line(module, f"{self._place(module)}, epoch {epoch}/{len(segment.span)}, {state}")

    def on_train_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Closes the bar."""
        self._trains = False
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, trainer: Trainer, module: ElasticCalibration, exception: BaseException) -> None:
        """Closes the bar, so that the message starts on a line of its own."""
        self.on_train_end(trainer, module)

    def on_validation_epoch_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Says what is compared on."""
        module.clock.restart()
        if self._enabled and not sys.stderr.isatty():
            count = sum(int(n) for n in trainer.num_val_batches) // len(ComparisonPass)
            self._line(module, f"comparing on {count} batch{'' if count == 1 else 'es'}, twice")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: ElasticCalibration,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the batch of the comparison."""
        name = _PASSES[ComparisonPass(dataloader_idx)]
        module.clock.step(name, batch_idx + 1, int(trainer.num_val_batches[dataloader_idx]))

    def on_validation_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Closes the bar of the comparison."""
        self.on_train_end(trainer, module)

    def _done(self, trainer: Trainer, module: ElasticCalibration, number: int, steps: int) -> int:
        """Steps of a stage that are done after so many of the current epoch."""
        segments = [s for s in module.schedule.segments if s.number == number and module.share.trains(s)]
        epochs = sum(min(max(module.current_epoch - s.epochs.start, 0), len(s.epochs)) for s in segments)
        return epochs * _batches(trainer) + (steps if module.segment.number == number else 0)

    def _show(self, trainer: Trainer, module: ElasticCalibration, name: str, done: int, of: int) -> None:
        """Draws the bar, or prints a line if there was none for a while."""
        on_terminal, now = sys.stderr.isatty(), time.monotonic()
        if now - self._shown < (_BETWEEN_DRAWINGS if on_terminal else _BETWEEN_LINES):
            return
        self._shown = now
        trains = self._trains and name == stage_name(module.segment.number)
        said = f"{self._place(module)}, step {done:,}/{of:,}" if trains else f"{name} {done:,}/{of:,}"
        said += f", {self._state(trainer, module)}" if trains else ""
        if not on_terminal:
            self._line(module, said)
            return
        if self._bar is None:
            shape = "{percentage:3.0f}%|{bar:20}| {desc}"
            self._bar = tqdm(total=100, dynamic_ncols=True, bar_format=shape, leave=False)
        left, total = module.clock.left.left(), module.clock.left.total
        self._bar.n = 100 * (1 - left / total) if total else 0
        self._bar.set_description_str(f"{said}, ETA {format_seconds(left)}")

    def _line(self, module: ElasticCalibration, said: str) -> None:
        """Prints a line with the time that is left of the run."""
        self._shown = time.monotonic()
        say(f"{said}, ETA {format_seconds(module.clock.left.left())}")

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


def _epochs(module: ElasticCalibration, number: int) -> int:
    """Epochs of a stage that this process goes through."""
    segments = [s for s in module.schedule.segments if s.number == number and module.share.trains(s)]
    return sum(len(segment.epochs) for segment in segments)


def _batches(trainer: Trainer) -> int:
    """Steps of an epoch."""
    return int(trainer.num_training_batches)
