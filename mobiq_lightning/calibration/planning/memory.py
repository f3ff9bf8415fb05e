"""Memory that each phase of a run takes at its peak, by formulas that `docs/memory.md` states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mobiq_lightning.calibration.hidden_states import BlockInputs
from mobiq_lightning.calibration.planning.compared import (
    ACTIVATIONS,
    COMPARED,
    LIBRARIES,
    PhaseMemory,
    comparison_memory,
)
from mobiq_lightning.calibration.planning.sizes import ModelSizes
from mobiq_lightning.calibration.schedule import Schedule, Stage
from mobiq_lightning.nn import kept_limit
from mobiq_lightning.sources import CPU_CACHE_BYTES
from mobiq_lightning.strategies import ObservesGains

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration
    from mobiq_lightning.sources import TextWindows

LEARNED = 12
"""Bytes for each number that is learned: itself and the two averages of AdamW."""
IN_TRAINING = 17
"""Bytes for each weight whose codes are trained: target, gradient, the two averages, and the codes that are frozen."""
WAITING = 13
"""Bytes for each weight that waits for a later sweep to go on with its codes: the same without gradient."""
UNWRITTEN = 2
"""Blocks whose learned tensors are in memory in a sweep on the host: the one in training, and the one that is written next."""
OF_RANGES, OF_CODES = 6, 2
"""Bytes that a training pass keeps for each weight until its backward pass, beside the weight itself, where ranges are trained
(a slope and two masks), and where codes alone are (the masks)."""
OF_A_LINEAR = 16
"""Bytes for each weight of the largest linear while it is read or goes backward: four tensors of float32."""
OF_A_ROUTED_LINEAR = 12
"""The same for each slice where tokens are routed, since all slices are made at once."""
ROUTED_ACTIVATIONS = 6
"""Further ones for each slice where gates are trained: inputs that are multiplied by them."""
LOGITS = 4
"""Tensors of logits, float32, that a training pass keeps, and as many again for the target and the loss."""


@dataclass(frozen=True)
class _Need:
    """Bytes beyond the libraries and the host's copy of the model.

    Args:
        host: What lies on the host in any case.
        device: What lies on the device that computes, which may be the host.
        frozen: Frozen weights on that device, if it is another than the host.
        tables: Hidden states among these bytes.
    """

    host: int = 0
    device: int = 0
    frozen: int = 0
    tables: int = 0


def memory_of_phases(
    sizes: ModelSizes, module: ElasticCalibration, text: TextWindows, device: str, free: int | None = None
) -> list[PhaseMemory]:
    """What each phase of a fit takes, in the order of the phases.

    Args:
        sizes: Sizes of the model.
        module: What the recipe says of the calibration.
        text: What it says of the text.
        device: Type of the device that computes, such as ``cpu`` or ``cuda``.
        free: Bytes that are free on that device, if it is another than the host and that is known.
    """
    needs: list[tuple[str, _Need]] = []
    if text.n_generated:
        needs.append(("text writing", _writing(sizes, text)))
    schedule = Schedule(module.stages, module.epochs_per_block, sizes.n_blocks)
    for number, sweep in enumerate(schedule.sweeps):
        name = "model stages" if sweep[0].scope == "model" else "block stages"
        needs.append((name, _sweep(sizes, module, text, schedule, number, device)))
    learned = LEARNED * sum(sizes.learned.values()) + sizes.sliced * _trains_codes(module.stages)
    gains = measuring_need(sizes, text.seq_len, 4, gradients=False) - sizes.model_bytes - sizes.sliced
    # Weights that are made once, here and for thresholds.
    all_depths = 4 * len(sizes.slice_bits) * sizes.sliced
    gains += min(all_depths, kept_limit(all_depths))
    needs.append(("layer gains", _Need(device=gains + learned, frozen=sizes.model_bytes)))
    phases: dict[str, PhaseMemory] = {}
    for name, need in needs:  # the largest of the phases of one name
        before = phases.get(name, PhaseMemory(name, 0, 0))
        host = LIBRARIES + sizes.model_bytes + need.host + (need.device if device == "cpu" else 0)
        other = 0 if device == "cpu" else need.device + need.frozen
        tables = max(need.tables, before.tables)
        optional = name == "layer gains" and not _asks_for_probes(sizes, module)
        phases[name] = PhaseMemory(name, max(host, before.host), max(other, before.device), tables, optional=optional)
    return [*phases.values(), comparison_memory(sizes, module, text, device, free)]


def table_bytes(sizes: ModelSizes, text: TextWindows) -> int:
    """Bytes of one table of hidden states, of all calibration windows."""
    return text.n_windows * text.seq_len * sizes.width * sizes.itemsize


def n_streams(stages: Sequence[Stage], depths: Sequence[int], block_inputs: BlockInputs) -> int:
    """Input streams of a sweep that go through the blocks: one for each depth in its losses, and one that is routed.

    Args:
        stages: The stages of the sweep.
        depths: Depths of the objective, which stages read that name none.
        block_inputs: What blocks are trained on; that of the full-precision model are the targets of the block before, and no
            stream goes through the blocks beside those.
    """
    if block_inputs == "full":
        return 0
    read = {d for stage in stages for d in (depths if stage.depths is None else stage.depths)}
    return len(read) + any(stage.trains("routers") for stage in stages)


def n_tables(streams: int, n_blocks: int) -> int:
    """Tables of hidden states that are alive at once.

    All streams share the embedding in front of the first block; from the second block on each has its own, and goes on in
    place. The targets have one too, and where there are no other streams what enters a block keeps one beside it.
    """
    return 1 + max(1, streams if n_blocks > 1 else 1)


def training_need(sizes: ModelSizes, stage: Stage, depths: Sequence[int], tokens: int, n_blocks: int) -> int:
    """Bytes that a training step keeps: weights as they are read, and activations.

    Args:
        sizes: Sizes of the model.
        stage: The stage.
        depths: Depths of the objective, which a stage reads that names none.
        tokens: Tokens of a batch.
        n_blocks: Blocks whose insides are kept until the backward pass.
    """
    read = depths if stage.depths is None else tuple(stage.depths)
    n_slices, routed = len(sizes.slice_bits), stage.trains("routers")
    passes = len(read) + n_slices * routed
    kept = OF_RANGES if stage.trains("ranges") else OF_CODES if stage.trains("codes") else 0
    weights = (kept + sizes.itemsize) * passes * _weights(sizes, n_blocks)
    if stage.trains_routers_alone:  # made once, and kept for all steps
        weights = min(weights, kept_limit(n_slices * sizes.itemsize * _weights(sizes, n_blocks)))
    of_token = ACTIVATIONS * len(read) + routed * (ACTIVATIONS + ROUTED_ACTIVATIONS * n_slices)
    transient = (OF_A_ROUTED_LINEAR * n_slices if routed else OF_A_LINEAR) * sizes.largest_linear
    return weights + of_token * sizes.width * sizes.itemsize * tokens * n_blocks + transient


def model_stage_need(sizes: ModelSizes, stage: Stage, module: ElasticCalibration, text: TextWindows) -> int:
    """Bytes that a model stage needs on the device: frozen weights, all that is learned, codes, and what a step keeps."""
    tokens, depths = text.batch_size * text.seq_len, module.model_objective.depths
    kept = 1 if module.recompute_blocks else sizes.n_blocks
    step = training_need(sizes, stage, depths, tokens, kept)
    passes = len(depths if stage.depths is None else stage.depths) + stage.trains("routers")
    logits = 4 * sizes.vocabulary * tokens * LOGITS * (1 + passes)
    inputs = sizes.width * sizes.itemsize * tokens * sizes.n_blocks if module.recompute_blocks else 0
    codes = (IN_TRAINING if stage.trains("codes") else int(_trains_codes(module.stages))) * sizes.sliced
    return sizes.model_bytes + LEARNED * sum(sizes.learned.values()) + codes + step + logits + inputs


def measuring_need(sizes: ModelSizes, seq_len: int, batch_size: int, gradients: bool) -> int:
    """Bytes that measuring layer gains needs on the device: frozen weights, codes, the logits and activations of a batch of
    windows, all depths of one input; for gradients those of one block with their squares, and the activations of a window.
    """
    width, vocabulary = sizes.width, sizes.vocabulary
    needed = sizes.model_bytes + sizes.sliced + 8 * (len(sizes.slice_bits) + 2) * sizes.largest_input
    needed += 4 * batch_size * seq_len * (4 * vocabulary + 16 * width)
    if gradients:
        needed += 12 * sizes.sliced // sizes.n_blocks + 4 * seq_len * (4 * vocabulary + 40 * width * sizes.n_blocks)
    return needed


def _sweep(
    sizes: ModelSizes, module: ElasticCalibration, text: TextWindows, schedule: Schedule, number: int, device: str
) -> _Need:
    sweep, tokens = schedule.sweeps[number], text.batch_size * text.seq_len
    learned, coded = sum(sizes.learned.values()), _trains_codes(module.stages)
    if sweep[0].scope == "model":
        needed = model_stage_need(sizes, sweep[0], module, text) - sizes.model_bytes
        before = 4 * learned + 5 * sizes.sliced * coded  # what guards keep to go back to
        return _Need(host=before, device=needed, frozen=sizes.model_bytes)
    depths = module.objective.depths
    step = max(training_need(sizes, stage, depths, tokens, 1) for stage in sweep)
    step = max(step, 4 * COMPARED * sizes.vocabulary * text.seq_len)  # guards look at the logits of a window
    tables = n_tables(n_streams(sweep, depths, module.block_inputs), sizes.n_blocks) * table_bytes(sizes, text)
    codes = IN_TRAINING * sizes.sliced_of_block * _trains_codes(sweep)
    later = [stage for following in schedule.sweeps[number + 1 :] for stage in following]
    to_go_on_with = (WAITING - 1) * _trains_codes(later)
    waiting = LEARNED * learned + to_go_on_with * sizes.sliced
    if device == "cpu":  # of blocks that are done, all is mapped from the training checkpoints; else their codes are
        waiting = min(
            waiting, UNWRITTEN * (LEARNED * learned // sizes.n_blocks + to_go_on_with * sizes.sliced_of_block)
        )
    unwritten = min(sizes.sliced, UNWRITTEN * sizes.sliced_of_block) * coded
    on_device = tables if module.storage == "device" else 0
    return _Need(
        host=unwritten + (tables if module.storage == "host" else 0),
        device=codes + step + waiting + on_device,
        frozen=sizes.block_bytes,
        tables=tables if module.storage != "disk" else 0,
    )


def _writing(sizes: ModelSizes, text: TextWindows) -> _Need:
    rows, cache = rows_at_once(sizes, text), sizes.cache_bytes * text.seq_len
    return _Need(device=rows * (cache + 12 * sizes.vocabulary), frozen=sizes.model_bytes)


def rows_at_once(sizes: ModelSizes, text: TextWindows) -> int:
    """Documents that the model writes at a time on a CPU."""
    wanted = math.ceil(1.1 * text.n_generated) + 1
    return max(1, min(wanted, int(CPU_CACHE_BYTES // (sizes.cache_bytes * text.seq_len))))


def _weights(sizes: ModelSizes, n_blocks: int) -> int:
    return sizes.sliced if n_blocks == sizes.n_blocks else n_blocks * sizes.sliced_of_block


def _trains_codes(stages: Sequence[Stage]) -> bool:
    return any(stage.trains("codes") for stage in stages)


def _asks_for_probes(sizes: ModelSizes, module: ElasticCalibration) -> bool:
    """Whether routers need layer gains that only passes of the whole model give."""
    with torch.random.fork_rng(devices=[]):
        router = module.router(sizes.width, len(sizes.slice_bits))
    return isinstance(router, ObservesGains) and router.gains_from == "probes"
