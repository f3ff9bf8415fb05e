"""Runs one cell of a comparison as a process of its own: ``python -m mobiq_lightning.comparison.cell RECIPE FOLDER``.

It runs ``fit`` on the recipe, and leaves how long it took and how much memory it needed beside the run's results.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from mobiq_lightning.comparison.file_names import CELL
from mobiq_lightning.console import make_streams_usable
from mobiq_lightning.jobs import exit_code, fit
from mobiq_lightning.runs import RUN_CONFIG, Record, at_least

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(frozen=True)
class CellFigures(Record):
    """Content of cell.json: what a finished cell took.

    Args:
        seconds: Seconds that the run took; if it was resumed, those of its last part alone.
        peak_memory_gb: Most memory that the run needed, in GB.
        resumed: Whether the run was resumed.
    """

    seconds: float = field(metadata=at_least(0))
    peak_memory_gb: float = field(metadata=at_least(0))
    resumed: bool


def run_cell(recipe: str, folder: Path) -> int:
    """Runs ``fit`` on the recipe of a cell, and writes cell.json if it succeeds and there is none yet.

    Args:
        recipe: Path of the recipe.
        folder: The run folder that the recipe names.

    Returns:
        The exit code of ``fit``.
    """
    resumed = (folder / RUN_CONFIG).is_file()
    started = time.monotonic()
    code = exit_code(lambda: fit(recipe))
    if code == 0 and not (folder / CELL).is_file():
        from mobiq_lightning.environment import peak_memory_gb
        from mobiq_lightning.files import write_json

        figures = CellFigures(
            seconds=round(time.monotonic() - started, 1),
            peak_memory_gb=round(peak_memory_gb(), 3),
            resumed=resumed,
        )
        write_json(folder / CELL, figures.to_json())
    return code


def die_with(parent: int) -> None:
    """Has the system kill this process when its parent ends, for whatever reason (Linux only).

    A comparison that is killed and started again would otherwise meet its own cells, still running.

    Args:
        parent: Process id of the parent.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    make_streams_usable()
    if "LOCAL_RANK" not in os.environ:  # the first process; those that Lightning starts end with it
        die_with(os.getppid() if len(sys.argv) < 4 else int(sys.argv[3]))
    sys.exit(run_cell(sys.argv[1], Path(sys.argv[2])))
