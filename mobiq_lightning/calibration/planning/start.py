"""Starts the clock of a run on its plan, and says the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobiq_lightning.calibration.planning.plan import plan_run
from mobiq_lightning.calibration.planning.step_times import guessed_times
from mobiq_lightning.calibration.planning.time_left import TimeLeft
from mobiq_lightning.calibration.planning.work import comparison_phases
from mobiq_lightning.console import say
from mobiq_lightning.environment import give_back_memory

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration


def begin_clock(module: ElasticCalibration) -> None:
    """Works out the plan of a fit, says it and starts the clock of the run on it, once."""
    if module.clock.left.phases:
        return
    trainer, text = module.trainer, module.text
    device, callbacks = trainer.strategy.root_device, trainer.callbacks  # type: ignore[attr-defined]
    plan = plan_run(module.sliced.source.model, module, text, callbacks, module.run_folder, device, trainer.world_size)
    give_back_memory()  # of the models that steps were measured on
    module.clock.left = TimeLeft(plan.phases)
    module.clock.restart()
    if trainer.is_global_zero:
        short = [line for line in plan.shortages(device.type) if line.startswith("memory: ")]  # disk is said later
        for line in (*plan.lines(), *plan.by_block(str(device)), *short):
            say(line)


def begin_comparison_clock(module: ElasticCalibration) -> None:
    """Starts the clock of a comparison alone."""
    if not module.clock.left.phases:
        sizes, world = module.sizes, module.trainer.world_size
        times = guessed_times(sizes, module, module.text)
        module.clock.left = TimeLeft(comparison_phases(module, module.text, world, times, sizes.slice_bits))
        module.clock.restart()
