"""How training checkpoints are written and read: atomically, each with its hash; and nothing in them runs."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mobiq_lightning.calibration.checkpoint_parts import CheckpointParts
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.files import sha256, write_atomically, write_text
from mobiq_lightning.runs import TrainingCheckpoints

_UNREADABLE = (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, TypeError)
"""What torch raises for a file that is damaged, or that would run code."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes training checkpoints atomically, each with its SHA-256 beside it, and reads tensors and plain values alone.

    What the calibration says is at rest, such as blocks that are done, goes into files of its own, which later checkpoints name.

    Args:
        before_writing: Called before each is written; it raises if the run must not write any more.
    """

    def __init__(self, before_writing: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._before_writing = before_writing
        self._parts = CheckpointParts()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes one; a kill at any moment leaves the ones before it whole.

        Raises:
            OSError: If it cannot be written; the ones before it are whole.
        """
        if self._before_writing is not None:
            self._before_writing()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        changing, parts = self._parts.take_out(checkpoint, path.parent)
        write_atomically(path, lambda temporary: torch.save(changing, temporary))
        write_text(path.with_suffix(".sha256"), "\n".join([sha256(path), *parts]))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads one; whatever the environment says, nothing but tensors and plain values is ever made of it.

        Raises:
            CheckpointError: If it is damaged, or holds something else, which might run code.
        """
        try:
            found: dict[str, Any] = _load(path, map_location)
            return self._parts.put_back(found, Path(path).parent, partial(_load, map_location=map_location))
        except _UNREADABLE as error:
            raise CheckpointError(
                f"{path} is damaged, or not safe to load; remove it, and an older one is used"
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes one and its hash, and parts that no other one names."""
        TrainingCheckpoints(Path(path).parent).remove(Path(path))


def can_be_read(path: Path) -> bool:
    """Whether a training checkpoint holds tensors and plain values alone; its tensors are not read from disk."""
    try:
        found = CheckpointParts().put_back(
            _load(path, "cpu", mmap=True), path.parent, partial(_load, map_location="cpu", mmap=True)
        )
    except _UNREADABLE:
        return False
    return "state_dict" in found


def _load(path: str | Path, map_location: Any, mmap: bool = False) -> Any:
    """What a file holds, if that is tensors and plain values alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how foreign files were made, which is said by the error
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
