"""How training checkpoints are written: atomically, each with its hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from mobiq_lightning.files import sha256, write_atomically, write_text


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes training checkpoints atomically, each with its SHA-256 beside it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes one; a kill at any moment leaves the ones before it whole."""
        import torch

        path = Path(path)
        write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))
        write_text(path.with_suffix(".sha256"), sha256(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes one and its hash."""
        super().remove_checkpoint(path)
        Path(path).with_suffix(".sha256").unlink(missing_ok=True)
