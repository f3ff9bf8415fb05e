"""Says before any work whether the disk has room for what a run will write."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from mobiq_lightning.calibration.planning import bytes_on_disk
from mobiq_lightning.console import say

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration


def bytes_of_run(module: ElasticCalibration) -> int:
    """Bytes on disk that a run needs at its end; logs and texts that the model writes come on top."""
    return bytes_on_disk(module.sizes, module, module.text)


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
