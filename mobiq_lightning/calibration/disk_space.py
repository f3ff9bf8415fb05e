"""Says before any work whether the disk has room for what a run will write."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from mobiq_lightning.console import say
from mobiq_lightning.nn import SlicedLinear

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration

_TRAINING_CHECKPOINTS = 4
"""Training checkpoints that are there at once: three are kept while the next is written."""
_PER_PARAMETER = 3
"""What is learned and the two averages that AdamW keeps of it."""
_OF_CODES = 1.3
"""Bytes of a training checkpoint for each weight whose codes are learned, as measured."""


def bytes_of_run(module: ElasticCalibration) -> int:
    """Bytes on disk that a run needs at its end: the elastic checkpoint and the training checkpoints.

    An estimate: codes and tensors that are not sliced, and all that is learned with its optimizer state. Logs, texts that the
    model writes and hidden states on disk come on top.
    """
    sliced = [inner for inner in module.sliced.source.model.modules() if isinstance(inner, SlicedLinear)]
    n_weights = sum(linear.weight.numel() for linear in sliced)
    planes = sum(linear.weight.numel() * sum(linear.scheme.slice_bits) // 8 for linear in sliced)
    learned = list(module.blocks.parameters())
    counted = {id(p) for p in learned} | {id(linear.weight) for linear in sliced}
    others = _bytes_of(p for p in module.sliced.source.model.parameters() if id(p) not in counted)
    codes = int(_OF_CODES * n_weights) if any(stage.trains("codes") for stage in module.stages) else 0
    return planes + others + _bytes_of(learned) + _TRAINING_CHECKPOINTS * (_PER_PARAMETER * _bytes_of(learned) + codes)


def _bytes_of(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def say_if_short(module: ElasticCalibration) -> None:
    """Tells the user if less is free on the disk of the run folder than the run will need beside what it has written."""
    folder = module.run_folder
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed, free = bytes_of_run(module) - written, shutil.disk_usage(folder).free
    if free < needed:
        say(
            f"{folder}: {free / 1e6:.1f} MB are free on its disk, and this run will need about {needed / 1e6:.1f} MB (checkpoint "
            "and training checkpoints). It goes on; if the disk fills up, finished epochs are kept: make room, and give the "
            "same command"
        )
