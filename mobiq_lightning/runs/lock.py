"""A lock that keeps other processes out of a folder for as long as one is at work in it."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

from mobiq_lightning.console import say
from mobiq_lightning.errors import RunFolderError

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class FolderLock:
    """A lock on a file, which the system gives up when the process ends, in whatever way.

    Args:
        path: The file, in a folder that exists. It is there only while the lock is held, or after a kill.
        place: What is locked, for messages; by default the folder.
        where: Where a process that holds the lock is at work.
    """

    def __init__(self, path: Path, place: str = "", where: str = "in this folder") -> None:
        self.path, self._place, self._where = path, place or f"{path.parent}", where
        self._handle: int | None = None

    def acquire(self, patience: float = 0.0) -> None:
        """Takes the lock.

        Args:
            patience: Seconds to wait for a process that holds it.

        Raises:
            RunFolderError: If another process holds it, naming that process.
            OSError: If the file cannot be made.
        """
        try:
            import fcntl
        except ImportError:
            say(f"{self.path.parent}: this system has no locks; see to it that no other run works in the folder.")
            return
        deadline = time.monotonic() + patience
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _holder(handle)
                os.close(handle)
                if error.errno in _NO_LOCKS:
                    say(f"{self.path.parent}: its file system has no locks; see to it that no other run works in it.")
                    return
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                raise RunFolderError(self._in_work(holder)) from error
            if _same_file(self.path, handle):
                break
            os.close(handle)  # the one who held it has removed it meanwhile
        self._handle = handle
        note = json.dumps({"pid": os.getpid(), "host": platform.node()}).encode()
        os.ftruncate(handle, 0)
        with suppress(OSError):  # on a full disk nobody learns who holds it
            os.write(handle, note)

    def check_free(self) -> None:
        """Makes sure that no other process holds the lock, without taking it.

        Raises:
            RunFolderError: If one does, naming it.
        """
        try:
            import fcntl

            handle = os.open(self.path, os.O_RDWR)
        except (ImportError, OSError):
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunFolderError(self._in_work(_holder(handle))) from error
        finally:
            os.close(handle)

    def _in_work(self, holder: str) -> str:
        return f"{self._place}: {holder} is at work {self._where}; wait for it, or end it"

    @property
    def held(self) -> bool:
        """Whether the lock was taken."""
        return self._handle is not None

    @property
    def lost(self) -> bool:
        """Whether the lock was taken, and its file has been removed since, as when somebody removes the folder."""
        return self._handle is not None and not _same_file(self.path, self._handle)

    def release(self) -> None:
        """Gives the lock up, and removes its file; does nothing if it is not held."""
        if self._handle is None:
            return
        if _same_file(self.path, self._handle):
            with suppress(OSError):
                self.path.unlink()
        os.close(self._handle)
        self._handle = None


def _same_file(path: Path, handle: int) -> bool:
    try:
        found, held = path.stat(), os.fstat(handle)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def _holder(handle: int) -> str:
    """Who holds a lock, as the start of a sentence."""
    try:
        note = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(note['pid'])} on {note['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
