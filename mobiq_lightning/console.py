"""What the user is told while a command runs."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

SCRIPT = "mobiq-lightning"
MODULE = "python -m mobiq_lightning"
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Environment variables in which launchers tell a process its place; in the first process all that are set are 0."""
_NO_TERMINAL_COLUMNS = 120
"""Width of tables where standard output is no terminal: as much as the widest table needs."""


def say(message: str) -> None:
    """Tells the user something, on standard error: standard output is for results. Of several processes only the first does."""
    if all(os.environ.get(name, "0") == "0" for name in _RANKS):
        print(message, file=sys.stderr, flush=True)


def program() -> str:
    """How this program was started, as a user would type it again: the installed script, or Python with the package."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else MODULE


def table_console() -> Console:
    """Where tables are printed: standard output, wide enough for all of them where it is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else max(_NO_TERMINAL_COLUMNS, shutil.get_terminal_size().columns)
    return Console(width=width, markup=False)  # names of models and tasks may have brackets in them
