"""What a job does when it is told to end: it says how to go on, and ends with the exit code that shells give signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

_ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals with which schedulers and terminals end a process."""


class Terminated(SystemExit):
    """A signal that ends the process, other than Ctrl-C: its exit code is 128 and the signal's number.

    Args:
        number: The signal.
        message: What is said of it.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(128 + number)
        self.number, self.message = number, message


@dataclass
class Interruption:
    """What is said to a user whose job was interrupted.

    Args:
        how_it_goes_on: Says what of the work is kept and how to go on.
    """

    how_it_goes_on: Callable[[], str]


@contextmanager
def interruptible(otherwise: str) -> Iterator[Interruption]:
    """Within it a signal that ends processes ends the job at once, wherever it is, and the error says how to go on.

    Ctrl-C is a `KeyboardInterrupt`, and works again afterwards: Lightning exits, and ignores the next ones. SIGTERM and SIGHUP
    are a `Terminated`, unless the process handles or ignores them itself, as under `nohup`. A second one ends the process
    without ado.

    Args:
        otherwise: What is said of going on until the job knows more.
    """
    told = Interruption(lambda: otherwise)
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
        for number in _ENDS:
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.SIG_DFL
                signal.signal(number, _terminate)
    try:
        yield told
    except Terminated as end:
        name = signal.Signals(end.number).name
        raise Terminated(end.number, f"terminated ({name}); {told.how_it_goes_on()}") from end
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; {told.how_it_goes_on()}") from error
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted; {told.how_it_goes_on()}") from end
        raise
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise Terminated(number)
