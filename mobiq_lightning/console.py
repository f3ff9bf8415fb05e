"""What the user is told while a command runs."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from rich.console import Console

_NO_TERMINAL_COLUMNS = 120
"""Width of tables where standard output is no terminal: as much as the widest table needs."""


@rank_zero_only
def say(message: str) -> None:
    """Tells the user something, on standard error: standard output is for results."""
    print(message, file=sys.stderr, flush=True)


def table_console() -> Console:
    """Where tables are printed: standard output, wide enough for all of them where it is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else max(_NO_TERMINAL_COLUMNS, shutil.get_terminal_size().columns)
    return Console(width=width)
