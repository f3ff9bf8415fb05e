"""How a job ends: its errors as lines on the terminal, and the exit code."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mobiq_lightning.console import say
from mobiq_lightning.errors import DiskError, MissingExtraError, MobiqError, RecipeError
from mobiq_lightning.jobs.interruption import Terminated

_ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "your quota there is used up; make room, or have it raised",
    errno.EFBIG: "files may not be that large there (`ulimit -f`)",
    errno.EROFS: "give a place that can be written to",
    errno.EACCES: "give a place that you may use",
    errno.EPERM: "give a place that you may use",
    errno.EMFILE: "allow more open files (`ulimit -n`)",
    errno.ENFILE: "the system has too many open files",
    errno.EIO: "the disk may be failing",
}
"""What to do, by number of the system's error."""


def exit_code(job: Callable[[], object]) -> int:
    """Runs a job, and says in a line what went wrong.

    Args:
        job: What to run.

    Returns:
        0 done, 1 failed, 2 asked for something that does not exist or is not installed, 130 interrupted,
        141 nobody reads the output any more, 128 and the number of the signal (143 for SIGTERM) terminated.
    """
    try:
        job()
    except MobiqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (RecipeError, MissingExtraError)) else 1
    except BrokenPipeError:  # whoever read the output, as `head` does, has had enough
        with suppress(OSError, ValueError):
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # or Python would complain once more at its end
        return 141
    except OSError as error:
        print(f"error: {describe_os_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        say(str(error) or "interrupted", always=True)
        return 130
    except Terminated as end:
        say(end.message, always=True)
        return 128 + end.number
    return 0


@contextmanager
def disk_errors(how_it_goes_on: Callable[[], str]) -> Iterator[None]:
    """Within it, what the system refuses (a full disk, no rights, too many open files) is a `DiskError`.

    Args:
        how_it_goes_on: Says what of the work is kept and how to go on.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:  # a library's, about something else
            raise
        raise DiskError(f"{describe_os_error(error)}; {how_it_goes_on()}") from error


def describe_os_error(error: OSError) -> str:
    """What the system refused, in a line: the file, the reason, what is free on its disk, what to do."""
    if error.errno is None:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    path = error.filename
    text = f"{os.fsdecode(path)}: " if isinstance(path, (str, bytes, os.PathLike)) else ""
    text += os.strerror(error.errno).lower()
    free = (
        _free_bytes(Path(os.fsdecode(path))) if text and error.errno in (errno.ENOSPC, errno.EDQUOT) and path else None
    )
    text += f" ({free / 1e6:.1f} MB are free on its disk)" if free is not None else ""
    return f"{text}; {_ADVICE[error.errno]}" if error.errno in _ADVICE else text


def _free_bytes(path: Path) -> int | None:
    """Bytes that are free on the disk that a path is on, or will be."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None
