"""Room that a run needs on the disk of its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobiq_lightning.calibration.planning.memory import LEARNED, WAITING, n_streams, n_tables, table_bytes
from mobiq_lightning.calibration.planning.sizes import ModelSizes, groups_of
from mobiq_lightning.calibration.schedule import Schedule
from mobiq_lightning.nn import BUDGET_STEP
from mobiq_lightning.packing import SCALE_DTYPE, STORED_DTYPE

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration
    from mobiq_lightning.sources import TextWindows

TRAINING_CHECKPOINTS = 4
"""Training checkpoints that are there at once: three are kept while the next is written."""
BEFORE = 4, 5
"""Bytes that guards keep, during a stage of the whole model, of each number that is learned and of each weight with its code."""


def bytes_on_disk(sizes: ModelSizes, module: ElasticCalibration, text: TextWindows) -> int:
    """Bytes that a run needs on disk: the elastic checkpoint, training checkpoints, and hidden states if they lie there.

    Logs, texts that the model writes and figures come on top.

    Args:
        sizes: Sizes of the model.
        module: What the recipe says of the calibration.
        text: What it says of the text.
    """
    outside = sizes.model_bytes - sizes.sliced * sizes.itemsize
    n_slices, span = len(sizes.slice_bits), sum(sizes.slice_bits[1:])
    thresholds = 2 * 4 * n_slices * round(span / BUDGET_STEP + 1) * sizes.n_inputs
    elastic = sizes.sliced * sum(sizes.slice_bits) // 8 + outside + 2 * SCALE_DTYPE.itemsize * groups_of(sizes)
    elastic += STORED_DTYPE.itemsize * sizes.learned["routers"] + thresholds
    schedule = Schedule(module.stages, module.epochs_per_block, sizes.n_blocks)
    tables = 0
    if module.storage == "disk":
        sweeps = [sweep for sweep in schedule.sweeps if sweep[0].scope == "block"]
        streams = max((n_streams(sweep, module.objective.depths, module.block_inputs) for sweep in sweeps), default=0)
        tables = n_tables(streams, sizes.n_blocks) * table_bytes(sizes, text)
    return elastic + _of_training(sizes, schedule) + tables


def _of_training(sizes: ModelSizes, schedule: Schedule) -> int:
    """Bytes of training checkpoints: whole ones if the whole model is trained; else each block once, and the one in training."""
    learned = sum(sizes.learned.values())
    trained = [any(stage.trains("codes") for stage in sweep) for sweep in schedule.sweeps]
    at_rest = (WAITING if sum(trained) > 1 else 1) * sizes.sliced * any(trained)
    if any(sweep[0].scope == "model" for sweep in schedule.sweeps):
        before = BEFORE[0] * learned + BEFORE[1] * sizes.sliced * any(trained)
        return TRAINING_CHECKPOINTS * (LEARNED * learned + at_rest + before)
    of_block = LEARNED * learned // sizes.n_blocks + WAITING * sizes.sliced_of_block * any(trained)
    return LEARNED * learned + at_rest + TRAINING_CHECKPOINTS * of_block
