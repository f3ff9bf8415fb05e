"""What the user is told while a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SCRIPT = "mobiq-lightning"
MODULE = "python -m mobiq_lightning"
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Environment variables in which launchers tell a process its place; in the first process all that are set are 0."""


def say(message: str) -> None:
    """Tells the user something, on standard error: standard output is for results. Of several processes only the first does."""
    if all(os.environ.get(name, "0") == "0" for name in _RANKS):
        print(message, file=sys.stderr, flush=True)


def program() -> str:
    """How this program was started, as a user would type it again: the installed script, or Python with the package."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else MODULE
