"""One cell of a comparison as a process of its own: ``python -m mobiq_lightning.comparison.cell RECIPE FOLDER``.

It runs ``fit`` on the recipe, and leaves how long it took and how much memory it needed beside the run's results.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from mobiq_lightning.jobs import exit_code, fit

CELL = "cell.json"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def run_cell(recipe: str, folder: Path) -> int:
    """Runs a cell to its end; a finished one is left as it is.

    Returns:
        The exit code of ``fit``.
    """
    resumed = (folder / "config.yaml").is_file()
    started = time.monotonic()
    code = exit_code(lambda: fit(recipe))
    if code == 0 and not (folder / CELL).is_file():
        from mobiq_lightning.environment import peak_memory_gb
        from mobiq_lightning.files import write_json

        figures = {
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "resumed": resumed,  # then the seconds are those of the last part alone
        }
        write_json(folder / CELL, figures)
    return code


def die_with(parent: int) -> None:
    """Has the system kill this process when its parent ends, however that ends (Linux only).

    A comparison that is killed and started again would otherwise meet its own cells, still running.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if "LOCAL_RANK" not in os.environ:  # the first process; those that Lightning starts end with it
        die_with(os.getppid() if len(sys.argv) < 4 else int(sys.argv[3]))
    sys.exit(run_cell(sys.argv[1], Path(sys.argv[2])))
