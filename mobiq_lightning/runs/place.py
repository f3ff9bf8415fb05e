"""What keeps a folder from being written to, found before any work; nothing is written for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mobiq_lightning.errors import RunFolderError

_LONGEST_PATH = 200
"""Characters of a path that a message shows."""


def obstacle(folder: Path) -> str:
    """Why a folder cannot be made or written to; empty if nothing is known that keeps it from that."""
    try:
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
        if not place.is_dir():
            return f"{shortened(place)} is no folder"
        return "" if os.access(place, os.W_OK | os.X_OK) else f"no right to write to {shortened(place)}"
    except (OSError, ValueError) as error:  # a name that no folder can have
        return reason(error)


def check_kinds(folder: Path, names: Sequence[str], folders: Sequence[str]) -> None:
    """Makes sure that no folder stands where a file is to be written, and no file where a folder is.

    Args:
        folder: The folder that will be written to.
        names: Names of all that will be written there.
        folders: Which of them are folders.

    Raises:
        RunFolderError: Naming all that stand in the way.
    """
    wrong = [name for name in names if (folder / name).exists() and (folder / name).is_dir() != (name in folders)]
    if wrong:
        said = ", ".join(f"{name} is a {'file' if name in folders else 'folder'}" for name in wrong)
        also = ", ".join(f"a {'folder' if name in folders else 'file'} {name}" for name in wrong)
        raise RunFolderError(
            f"{shortened(folder)}: {said}, and {also} is written there. Move it away, or give another folder"
        )


def reason(error: Exception) -> str:
    """Why something cannot be done, in the system's words."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def shortened(path: Path) -> str:
    """A path as a message shows it."""
    text = os.fspath(path)
    return text if len(text) <= _LONGEST_PATH else f"{text[:_LONGEST_PATH]}... ({len(text)} characters)"
