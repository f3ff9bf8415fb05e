"""Atomic writes: a file is there whole or not at all, whatever happens meanwhile; and what killed writers left is removed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:32] or "host"
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(?:@(?P<host>[A-Za-z0-9-]+))?\.(?P<kind>tmp|old)")
_PROBE_BYTES = 2**16
_in_use: set[Path] = set()
"""What this process is writing just now: a killed process before it may have had the same id, as in a container."""


def write_atomically(path: Path, write: Callable[[Path], object], named: Callable[[Path], str] | None = None) -> Path:
    """Lets `write` make a temporary file beside `path`, syncs it to disk and renames it to `path`.

    Args:
        path: The file.
        write: Makes it, under the name that it is given.
        named: Gives the name to take in place of that of `path`, of what was written, such as one with its hash.

    Returns:
        The file.

    Raises:
        OSError: If it cannot be written, naming `path`, also where the library that writes raises something else.
    """
    temporary = _beside(path, "tmp")
    _in_use.add(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        written = path if named is None else path.with_name(named(temporary))
        os.replace(temporary, written)
        sync(path.parent)
        return written
    except Exception as error:
        failure = _write_failure(error, temporary, path)
        if failure is None:
            raise
        raise failure from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _in_use.discard(temporary)


def sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def folder_replaced_atomically(folder: Path) -> Iterator[Path]:
    """Yields a new folder that takes the place of `folder` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(folder, "tmp")
    remove(temporary)
    _in_use.add(temporary)
    try:
        temporary.mkdir()
        yield temporary
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _in_use.discard(temporary)


def replace_folder(new: Path, folder: Path) -> None:
    """Puts a folder, synced to disk, in the place of another beside it, which need not exist.

    Between its two renames the old folder has another name; if the process is killed there, `remove_leftovers` brings it back.
    """
    old = _beside(folder, "old")
    for path in new.iterdir():
        sync(path)
    sync(new)
    _in_use.add(old)
    try:
        if folder.exists() or folder.is_symlink():
            remove(old)
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
        sync(folder.parent)
        with suppress(OSError):
            remove(old)
    finally:
        _in_use.discard(old)


def remove(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link, but never what a link points to; it need not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Whether a name is one that atomic writes give to what is not finished, and that a killed process leaves behind."""
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(folder: Path, names: Collection[str] | None = None) -> list[str]:
    """Removes what killed processes left of their atomic writes in a folder, but not of those that are still alive.

    A folder that was being replaced, and whose new content had not taken its place yet, is put back.

    Args:
        folder: The folder, which need not exist; folders in it are not looked into.
        names: Names of the files and folders whose leftovers are removed; None for all.

    Returns:
        Names of what was put back.
    """
    restored: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or (names is not None and found["name"] not in names) or _is_alive(path, found):
            continue
        target = folder / found["name"]
        if found["kind"] == "old" and not (target.exists() or target.is_symlink()):
            os.replace(path, target)
            restored.append(target.name)
        else:
            remove(path)
    return restored


def _beside(path: Path, kind: str) -> Path:
    """Where this process keeps what is not finished, or not wanted any more, in place of `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}@{_HOST}.{kind}")


def _is_alive(path: Path, found: re.Match[str]) -> bool:
    """Whether the process that made a temporary file may still need it; one of another machine may."""
    pid = int(found["pid"])
    if found["host"] not in (None, _HOST) or sys.platform == "win32":
        return True
    if pid == os.getpid():
        return path in _in_use
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _write_failure(error: Exception, temporary: Path, path: Path) -> OSError | None:
    """What kept a file from being written, naming the file; None for an error that is not the disk's."""
    if isinstance(error, OSError):
        number = error.errno
    elif found := re.search(r"os error (\d+)", str(error)):  # safetensors
        number = int(found[1])
    elif isinstance(error, RuntimeError):  # torch does not tell why, and words it in several ways
        number = _probe(temporary)
        if not number and re.search(r"inline_container|PytorchStreamWriter|iostream|basic_ios", str(error)):
            number = errno.EIO
    else:
        return None
    return OSError(number, os.strerror(number), str(path)) if number else None


def _probe(temporary: Path) -> int:
    """Why a file cannot be written: the error number of going on with it, 0 if that works."""
    try:
        with temporary.open("ab") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return 0
