"""The training checkpoints of a run, from which it goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mobiq_lightning.errors import FileError
from mobiq_lightning.files import sha256
from mobiq_lightning.input_files import read_text

_PATTERN = "*epoch-[0-9]*.ckpt"
"""Pattern of the names of training checkpoints; others are somebody else's."""


_PART = re.compile(r"block-(?P<name>\d{6}-(?:schemes|inputs))-(?P<hash>[0-9a-f]{64})\.part")
"""Names of the files that hold what several checkpoints have in common, with the SHA-256 of their bytes."""
OURS = re.compile(rf"(block-)?epoch-\d+(-v\d+)?\.(ckpt|sha256)|{_PART.pattern}")
"""Names of all files of training checkpoints."""


def part_name(file: str) -> str | None:
    """What of a model a part of training checkpoints holds, by the name of its file; None if that is no such name."""
    found = _PART.fullmatch(file) if isinstance(file, str) else None
    return None if found is None else found["name"]


class TrainingCheckpoints:
    """What a run keeps of its epochs, each with its hash and the names of its parts beside it, which are written last.

    Args:
        folder: The folder of them; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def are_there(self) -> bool:
        """Whether there is one, whole or not."""
        return any(self.folder.glob(_PATTERN))

    @property
    def epochs_kept(self) -> int:
        """Epochs done by the newest one that was written to its end; damage is not looked for."""
        found = self.folder.glob(_PATTERN)
        return max((_epoch(path) + 1 for path in found if path.with_suffix(".sha256").is_file()), default=0)

    def newest(self, can_be_read: Callable[[Path], bool]) -> tuple[Path | None, list[Path]]:
        """The newest one that is whole.

        Args:
            can_be_read: Whether one whose bytes are those that were written can be read.

        Returns:
            Its path, or None; and the newer ones that are damaged.
        """
        damaged: list[Path] = []
        hashes: dict[str, str] = {}  # most parts belong to several
        for path in sorted(self.folder.glob(_PATTERN), key=_epoch, reverse=True):
            if _has_its_hash(path, hashes) and can_be_read(path):
                return path, damaged
            damaged.append(path)
        return None, damaged

    def drop_after(self, epochs_done: int) -> None:
        """Removes those written after `epochs_done` epochs."""
        for path in self.folder.glob(_PATTERN):
            if _epoch(path) >= epochs_done:
                self.remove(path)

    def remove(self, path: Path) -> None:
        """Removes one with its hash, and parts that no other one names."""
        path.unlink(missing_ok=True)
        path.with_suffix(".sha256").unlink(missing_ok=True)
        named = {name for other in self.folder.glob(_PATTERN) for name in _lines(other)[1:]}
        for part in self.folder.glob("*.part"):
            if part.is_file() and _PART.fullmatch(part.name) and part.name not in named:
                part.unlink(missing_ok=True)


def _lines(path: Path) -> list[str]:
    """What stands beside a checkpoint: its hash, then names of its parts; nothing if it was not finished."""
    try:
        return read_text(path.with_suffix(".sha256")).split()
    except (FileError, OSError):
        return []


def _has_its_hash(path: Path, hashes: dict[str, str]) -> bool:
    """Whether a checkpoint and its parts hold the bytes that were written.

    Args:
        path: The checkpoint.
        hashes: Hashes of the parts that were looked at before, by name; those of others are added.
    """
    try:
        known, *parts = _lines(path) or [""]
        for name in parts:
            found = _PART.fullmatch(name)
            if found is None:
                return False
            if name not in hashes:
                hashes[name] = sha256(path.with_name(name))
            if hashes[name] != found["hash"]:
                return False
        return known == sha256(path)
    except OSError:
        return False


def _epoch(path: Path) -> int:
    found = re.search(r"epoch-(\d+)", path.stem)
    return int(found.group(1)) if found else -1
