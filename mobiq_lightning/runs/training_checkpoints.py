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


class TrainingCheckpoints:
    """What a run keeps of its epochs, each with its hash beside it, which is written last.

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
        for path in sorted(self.folder.glob(_PATTERN), key=_epoch, reverse=True):
            if _has_its_hash(path) and can_be_read(path):
                return path, damaged
            damaged.append(path)
        return None, damaged

    def drop_after(self, epochs_done: int) -> None:
        """Removes those written after `epochs_done` epochs."""
        for path in self.folder.glob(_PATTERN):
            if _epoch(path) >= epochs_done:
                path.unlink()
                path.with_suffix(".sha256").unlink(missing_ok=True)


def _has_its_hash(path: Path) -> bool:
    """Whether the hash beside a file is that of its bytes."""
    try:
        return read_text(path.with_suffix(".sha256")).strip() == sha256(path)
    except (FileError, OSError):
        return False


def _epoch(path: Path) -> int:
    found = re.search(r"epoch-(\d+)", path.stem)
    return int(found.group(1)) if found else -1
