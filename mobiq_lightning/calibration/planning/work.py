"""The phases of a run, each with its steps and what one of them takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mobiq_lightning.calibration.planning.bench import StepTimes
from mobiq_lightning.calibration.planning.compared import arms_of
from mobiq_lightning.calibration.planning.memory import n_streams, rows_at_once
from mobiq_lightning.calibration.planning.sizes import ModelSizes
from mobiq_lightning.calibration.planning.step_times import PER_SECOND, guessed_times
from mobiq_lightning.calibration.planning.time_left import Phase
from mobiq_lightning.calibration.schedule import Schedule, Stage

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration
    from mobiq_lightning.sources import TextWindows

WRITING, ROUTER_PASS, CONTROL_PASS = "text writing", "comparison", "comparison of the controls"
FORWARD = "forward"
"""Kind of phases that train nothing."""


def writing_phase(sizes: ModelSizes, text: TextWindows, times: StepTimes) -> list[Phase]:
    """The phase in which the model writes text, a step for every token of all documents; none if it writes none."""
    if not text.n_generated:
        return []
    batches = math.ceil(text.n_generated / rows_at_once(sizes, text))
    return [Phase(WRITING, FORWARD, batches * text.seq_len, times.written)]


def stage_phases(sizes: ModelSizes, module: ElasticCalibration, batches: int, times: StepTimes) -> list[Phase]:
    """A phase for every stage: its own steps, and in the first stage of a sweep the way of all tables through the blocks.

    Args:
        sizes: Sizes of the model.
        module: Has the stages.
        batches: Steps of an epoch.
        times: What steps take.
    """
    schedule = Schedule(module.stages, module.epochs_per_block, sizes.n_blocks)
    epochs = [0] * len(module.stages)
    first: dict[int, Stage] = {}
    for segment in filter(module.share.trains, schedule.segments):
        epochs[segment.number] += len(segment.epochs)
        first.setdefault(segment.sweep, segment.stage)
    phases = []
    for number, stage in enumerate(module.stages):
        steps, seconds = epochs[number] * batches, times.stages.get(number, 0.0)
        sweep = next((s for s, of_sweep in first.items() if of_sweep is stage), None)
        if steps and sweep is not None and stage.scope == "block":
            streams = n_streams(schedule.sweeps[sweep], module.objective.depths, module.block_inputs)
            seconds += sizes.n_blocks * (streams + 1) * batches * times.read / steps
        if steps:
            phases.append(Phase(stage_name(number), stage.scope, steps, seconds))
    return phases


def calibration_work(sizes: ModelSizes, module: ElasticCalibration, text: TextWindows) -> float:
    """Products and sums that all stages of a calibration take, by weights and tokens alone: the same on every machine.

    Args:
        sizes: Sizes of the model.
        module: Has the stages.
        text: Has the calibration windows, read or not.
    """
    times = guessed_times(sizes, module, text)
    phases = stage_phases(sizes, module, math.ceil(text.n_windows / text.batch_size), times)
    return PER_SECOND * sum(phase.steps * phase.seconds for phase in phases)


def stage_name(number: int) -> str:
    """What the phase of a stage is called."""
    return f"stage {number + 1}"


def comparison_phases(
    module: ElasticCalibration, text: TextWindows, world_size: int, times: StepTimes, slice_bits: Sequence[int]
) -> list[Phase]:
    """Both passes of the comparison, a step for every batch.

    Args:
        module: Says at which budgets and with which seeds.
        text: Has the evaluation windows, read or not.
        world_size: Processes that share them.
        times: What steps take.
        slice_bits: Bits of the slices: at the lowest and the highest depth controls read what the router reads.
    """
    batches, of_pass = text.n_eval_batches(world_size), text.eval_fill * times.compared
    first, second = arms_of(module, slice_bits)
    return [
        Phase(ROUTER_PASS, "comparison", batches, first * of_pass),
        Phase(CONTROL_PASS, "comparison", batches, second * of_pass),
    ]
