"""What the user is told while a command runs."""

from __future__ import annotations

import sys

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def say(message: str) -> None:
    """Tells the user something, on standard error: standard output is for results."""
    print(message, file=sys.stderr, flush=True)
