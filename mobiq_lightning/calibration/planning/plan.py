"""The plan of a run: what will be sliced, what it takes, and in which order, in a few lines at its start."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from mobiq_lightning.calibration.block_check import check_blocks
from mobiq_lightning.calibration.planning.bench import StepTimes
from mobiq_lightning.calibration.planning.compared import PhaseMemory
from mobiq_lightning.calibration.planning.disk import bytes_on_disk
from mobiq_lightning.calibration.planning.memory import memory_of_phases
from mobiq_lightning.calibration.planning.random_model import blocks_of_each_kind, random_model
from mobiq_lightning.calibration.planning.sizes import ModelSizes, sizes_of
from mobiq_lightning.calibration.planning.step_times import guessed_times, measure_steps
from mobiq_lightning.calibration.planning.time_left import FIXED, Phase, TimeLeft
from mobiq_lightning.calibration.planning.work import comparison_phases, stage_phases, writing_phase
from mobiq_lightning.environment import available_memory, format_seconds, free_on_device, resident_memory
from mobiq_lightning.packing import WHOLE_ROW

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration
    from mobiq_lightning.sources import TextWindows

_BESIDE = ("text writing", "guards")
"""Phases that come before the stages, or between them."""
_WORTH_MOVING = 0.02
"""Share of a phase from which on it is said that hidden states could lie on disk."""
_SOON = 1e9
"""Weights times tokens below which a run takes a minute or two on any machine, and no step is measured to say so."""


@runtime_checkable
class HasPhases(Protocol):
    """A callback that does work of its own after calibration or comparison."""

    def phases(self, module: ElasticCalibration, sizes: ModelSizes, text: TextWindows, times: StepTimes) -> list[Phase]:
        """The phases of its work, in their order."""


@dataclass(frozen=True)
class RunPlan:
    """What a run takes.

    Args:
        sizes: Sizes of the model, and what of it is sliced.
        memory: Bytes that each phase takes at its peak.
        memory_free: Bytes that are free on the host, and on the device; None where that is not known, or there is no other.
        disk: Bytes that the run needs in its folder.
        disk_free: Bytes that are free on the disk of the run folder.
        phases: What is done in which order, with what a step is expected to take.
        unmeasured: Why no step was measured; empty if steps were.
        times: What steps take.
    """

    sizes: ModelSizes
    memory: list[PhaseMemory]
    memory_free: tuple[int | None, int | None]
    disk: int
    disk_free: int
    phases: list[Phase] = field(default_factory=list)
    unmeasured: str = ""
    times: StepTimes = field(default_factory=StepTimes)

    @property
    def seconds(self) -> float:
        """What the whole run is expected to take."""
        return TimeLeft(self.phases).left()

    def shortages(self, device: str) -> list[str]:
        """What is too small for the run, a line for each phase that does not fit, with what to do."""
        found = []
        for phase in self.memory:
            free_host, free_device = self.memory_free
            for where, needed, free in (("the host", phase.host, free_host), (device, phase.device, free_device)):
                left_out = phase.optional and where == device
                if free is not None and needed > free and not left_out:
                    found.append(
                        f"memory: {phase.name} will take about {needed / 1e9:.1f} GB on {where}, of which {free / 1e9:.1f} GB "
                        f"are free; {_advice(phase, needed - free)}"
                    )
        if self.disk > self.disk_free:
            found.append(
                f"disk: the run will need about {self.disk / 1e9:.2f} GB, of which {self.disk_free / 1e9:.2f} GB are free; make "
                "room, or give another trainer.default_root_dir"
            )
        return found

    def by_block(self, device: str) -> list[str]:
        """A line for each phase in which one block at a time is on the device, since the whole model does not fit there."""
        free = self.memory_free[1]
        return [phase.by_block(self.sizes, device, free) for phase in self.memory if phase.whole and free is not None]

    def lines(self) -> list[str]:
        """The plan in a few lines, as the start of a run says it."""
        sizes = self.sizes
        slices = "+".join(map(str, sizes.slice_bits))
        groups = f", groups of {sizes.group_size}" if sizes.group_size and sizes.group_size < WHOLE_ROW else ""
        highest = max((max(phase.host, phase.device) for phase in self.memory), default=0)
        largest = next((p.name for p in self.memory if max(p.host, p.device) == highest), "")
        time = f"about {format_seconds(self.seconds)}" if not self.unmeasured else self.unmeasured
        names = [phase.name for phase in self.phases]
        stages = sum(1 for name in names if name.startswith("stage "))
        after = [name for name in names if not name.startswith("stage ") and name not in _BESIDE]
        left_out = [f"in full precision stay, of the weights in blocks: {sizes.left_out}"] if sizes.left_out else []
        return [
            f"{sizes.kind}, {sizes.n_blocks} blocks: {sizes.sliced / 1e6:,.2f} M weights ({sizes.share:.1%} of those in blocks) "
            f"are sliced into {slices} bits{groups}",
            *left_out,
            f"plan: {'text writing, ' if 'text writing' in names else ''}{stages} stage{'s' if stages != 1 else ''}"
            f"{', then ' if after else ''}{', '.join(after)}; {time}; at most {highest / 1e9:.1f} GB of memory ({largest}), "
            f"{self.disk / 1e6:,.1f} MB of disk",
        ]


_ADVICE = {
    "text writing": "set data.n_generated to 0",
    "block stages": "lower data.n_samples, data.seq_len or data.batch_size",
    "model stages": "take these stages out, set model.recompute_blocks, or lower data.batch_size",
    "layer gains": "lower data.seq_len, or take a router that needs no probes of the whole model",
    "comparison": "lower data.eval_batch_size or data.eval_seq_len, or use a larger device",
}


def _advice(phase: PhaseMemory, missing: int) -> str:
    """What to do about a phase that misses so many bytes."""
    advice = _ADVICE[phase.name]
    if phase.tables < _WORTH_MOVING * max(phase.host, phase.device):
        return advice
    enough = "or" if phase.tables >= missing else "and"
    return f"{phase.tables / 1e9:.1f} GB are hidden states: set model.hidden_states to disk, {enough} {advice}"


def plan_run(
    model: Any,
    module: ElasticCalibration,
    text: TextWindows,
    callbacks: Sequence[object],
    folder: Path,
    device: torch.device,
    world_size: int = 1,
    always_measure: bool = False,
) -> RunPlan:
    """Works out what a run takes.

    Args:
        model: The source model; its weights may be on the meta device.
        module: What the recipe says of the calibration.
        text: The windows of text, read or not.
        callbacks: Those of the run; what they do after calibration is part of the plan.
        folder: The run folder.
        device: Where to run.
        world_size: Processes that share the windows.
        always_measure: Take a step of each kind also where the whole run takes a minute or two, and try whether blocks can be
            called one at a time.

    Raises:
        ModelError: If the model cannot be sliced, or its blocks cannot be called one at a time.
    """
    sizes = sizes_of(model, module)
    room, on_device = available_memory(), free_on_device(device)  # needs are those of the whole process
    memory = memory_of_phases(sizes, module, text, device.type, on_device)
    free = (None if room is None else room + resident_memory(), on_device)
    times, unmeasured = guessed_times(sizes, module, text), ""
    windows = text.n_windows
    if always_measure or sizes.sliced * windows * text.seq_len > _SOON:
        if RunPlan(sizes, memory, free, 0, 0).shortages(device.type):
            unmeasured = "no step was measured, as there is too little memory"
        else:
            if always_measure:
                _check_family(model.config, module)
            try:
                times = measure_steps(model.config, sizes, module, text, device)
            except Exception as error:  # noqa: BLE001 - of whatever kind: a family that cannot be made small
                said = (str(error).strip().splitlines() or [""])[0][:120]
                unmeasured = f"no step could be measured ({type(error).__name__}: {said})"
    else:
        unmeasured = "a minute or two"
    batches = math.ceil(math.ceil(windows / world_size) / text.batch_size)
    phases = [*writing_phase(sizes, text, times), *stage_phases(sizes, module, batches, times)]
    with torch.random.fork_rng(devices=[]):  # a router may be built to see what it asks for
        timed = not any(phase.whole for phase in memory)  # else speed is not measured
        doing = [
            callback.phases(module, sizes, text, times)
            for callback in callbacks
            if isinstance(callback, HasPhases) and (timed or not getattr(callback, "measures_speed", False))
        ]
    own = [phase for found in doing for phase in found]
    phases += sorted((phase for phase in own if phase.kind != FIXED), key=lambda phase: phase.late)
    phases += comparison_phases(module, text, world_size, times, sizes.slice_bits) if module.share.own is None else []
    phases += [phase for phase in own if phase.kind == FIXED]
    disk = bytes_on_disk(sizes, module, text)
    return RunPlan(sizes, memory, free, disk, _free(folder), phases, unmeasured, times)


def _check_family(config: Any, module: ElasticCalibration) -> None:
    """Tries whether blocks of each kind can be called one at a time, with random weights; a fit tries it with the model's own.

    Raises:
        ModelError: If they cannot.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            made = random_model(config, blocks_of_each_kind(config), torch.device("cpu"))
        except Exception:  # noqa: BLE001 - a family that cannot be made small; measuring says so
            return
        check_blocks(made, list(module.layout.find(made)), module.layout)


def _free(folder: Path) -> int:
    """Bytes that are free on the disk that a folder is on, or will be."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(place).free
