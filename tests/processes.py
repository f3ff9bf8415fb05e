"""Commands in processes of their own, which need not import the libraries each time: a process that has them is forked."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["mobiq_lightning.jobs.cli", "mobiq_lightning.calibration", "mobiq_lightning.callbacks"])


def start(arguments: list[str], said: Path) -> BaseProcess:
    """Starts a command as ``python -m mobiq_lightning`` would.

    Args:
        arguments: The command and what follows it.
        said: File for what it prints.

    Returns:
        A process that can be killed, and whose `exitcode` is that of the command.
    """
    process = _SERVER.Process(target=_run, args=(arguments, str(said)), daemon=True)
    process.start()
    return process


def _run(arguments: list[str], said: str) -> None:
    """What the new process does."""
    from mobiq_lightning.cli import main

    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.exit(main(arguments))
