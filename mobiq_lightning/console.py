"""What the user is told while a command runs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

SCRIPT = "mobiq-lightning"
MODULE = "python -m mobiq_lightning"
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Environment variables in which launchers tell a process its place; in the first process all that are set are 0."""
_whole_tables: ContextVar[bool] = ContextVar("whole_tables", default=False)
_NO_TERMINAL_COLUMNS = 120
"""Width of tables where standard output is no terminal: as much as the widest table needs."""


Verbosity = Literal["quiet", "usual", "verbose"]
"""How much is told: errors and results alone; also what is done and how far it is; also what libraries say themselves."""
_verbosity: Verbosity = "usual"


def verbosity() -> Verbosity:
    """How much the user is told at present."""
    return _verbosity


@contextmanager
def telling(much: Verbosity) -> Iterator[None]:
    """Within it, the user is told so much."""
    global _verbosity
    before, _verbosity = _verbosity, much
    try:
        yield
    finally:
        _verbosity = before


def say(message: str, *, always: bool = False) -> None:
    """Tells the user something, on standard error: standard output is for results. Of several processes only the first does.

    Args:
        message: What is said.
        always: Say it also where the user wants to be told of errors and results alone.
    """
    if is_first_process() and (always or _verbosity != "quiet"):
        print(message, file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this is the first of the processes that share a job, or the only one."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def make_streams_usable() -> None:
    """Has the standard streams take whatever is written: closed ones lead nowhere, and what one cannot encode becomes ``?``.

    Were a closed stream left closed, the next file that is opened would take its place, and get what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    utf8 = (getattr(sys.stdout, "encoding", None) or "").lower() in ("utf-8", "utf8")
    endangered = ("strict",) if utf8 else ("strict", "surrogateescape")
    if getattr(sys.stdout, "errors", None) in endangered and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # standard error has a way of its own


def as_utf8(text: str) -> str:
    """A text of the command line, which is UTF-8 whatever the locale says; bytes that are not become replacement characters."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def program() -> str:
    """How this program was started, as a user would type it again: the installed script, or Python with the package."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else MODULE


@contextmanager
def whole_tables(whole: bool = True) -> Iterator[None]:
    """Within it, tables on the terminal have all their rows, if so wished, and not only those that most want to see."""
    before = _whole_tables.set(whole)
    try:
        yield
    finally:
        _whole_tables.reset(before)


def tables_are_whole() -> bool:
    """Whether tables on the terminal have all their rows."""
    return _whole_tables.get()


def table_console() -> Console:
    """Where tables are printed: standard output, wide enough for all of them where it is no terminal."""
    from rich.console import Console

    class Table(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # the command line answers it; rich would end the process with another exit code

    width = None if sys.stdout.isatty() else max(_NO_TERMINAL_COLUMNS, shutil.get_terminal_size().columns)
    return Table(width=width, markup=False)  # names of models and tasks may have brackets in them
