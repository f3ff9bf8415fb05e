"""How often each block of a run was started anew after NaN or infinity."""

from __future__ import annotations

from pathlib import Path

from mobiq_lightning.errors import FileError, RunFolderError
from mobiq_lightning.files import write_json
from mobiq_lightning.input_files import read_mapping

_WHOLE_MODEL = "model"


class Retries:
    """Counts retries in a file of the run folder, so that they outlive the process.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def counts(self) -> dict[int | None, int]:
        """How often each block, or the stages of the whole model (None), were started anew.

        Raises:
            RunFolderError: If the file is damaged.
        """
        try:
            stored = read_mapping(self.path) if self.path.is_file() else {}
            if not all(
                (k == _WHOLE_MODEL or k.isdecimal()) and type(v) is int and 0 <= v < 100 for k, v in stored.items()
            ):
                raise FileError(
                    f"{self.path} should say how often each block was started anew, and says {str(stored)[:80]}"
                )
        except FileError as error:
            raise RunFolderError(
                f"{error}. Remove the file: the run goes on, and blocks that were started anew have their full learning rates"
            ) from error
        return {None if k == _WHOLE_MODEL else int(k): v for k, v in stored.items()}

    def note(self, block: int | None) -> int:
        """Counts a retry of a block; returns how many it has had."""
        counts = self.counts()
        counts[block] = counts.get(block, 0) + 1
        write_json(self.path, {_WHOLE_MODEL if k is None else k: v for k, v in counts.items()})
        return counts[block]
