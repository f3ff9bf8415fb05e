"""Commands in processes of their own, which need not import the libraries each time: a process that has them is forked."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["mobiq_lightning.jobs.cli", "mobiq_lightning.calibration", "mobiq_lightning.callbacks"])


def start(arguments: list[str], said: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Starts a command as ``python -m mobiq_lightning`` would.

    Args:
        arguments: The command and what follows it.
        said: File for what it prints.
        environment: Variables that it has beside those of this process.

    Returns:
        A process that can be killed, and whose `exitcode` is that of the command.
    """
    return _start(_command, arguments, str(said), dict(environment or {}))


def start_together(arguments: list[str], folder: Path, count: int) -> list[BaseProcess]:
    """Starts a command in several processes that share it, as ``torchrun`` would.

    Args:
        arguments: The command and what follows it.
        folder: Where each leaves what it prints, in a file that its rank is the name of.
        count: How many.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    ranks = map(str, range(count))
    return [start(arguments, folder / rank, {**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in ranks]


@contextmanager
def forked_cells() -> Iterator[None]:
    """Has comparisons of this process fork their cells."""
    with pytest.MonkeyPatch.context() as patch:
        names = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT")}
        patch.setattr("mobiq_lightning.comparison.workers.subprocess", SimpleNamespace(Popen=_Cell, **names))
        yield


class _Cell:
    """As much of `subprocess.Popen` as a comparison uses for a cell."""

    def __init__(self, command: list[str], stdout: IO[bytes], env: Mapping[str, str], **_: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "mobiq_lightning.comparison.cell"]
        self._process = _start(_module, command[2:], stdout.name, dict(env))

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def _start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = _SERVER.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def _command(arguments: list[str], said: str, environment: dict[str, str]) -> None:
    from mobiq_lightning.cli import main

    os.environ.update(environment)
    _print_to(said)
    sys.exit(main(arguments))


def _module(arguments: list[str], said: str, environment: dict[str, str]) -> None:
    """Runs a module whose last argument is the process that it ends with: here the one that was forked."""
    os.environ.clear()
    os.environ.update(environment)
    _print_to(said)
    sys.argv = [*arguments[:-1], str(os.getppid())]
    runpy.run_module(arguments[0], run_name="__main__")


def _print_to(path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
