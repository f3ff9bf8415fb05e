"""What runs on the same model and text need only do once: tokens, and the rows of the comparison that no strategy changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mobiq_lightning.files import write_atomically, write_json
from mobiq_lightning.runs.record import Record, read_json
from mobiq_lightning.runs.rows import Row


@dataclass(frozen=True)
class _KeptRows(Record):
    """A file of rows.

    Args:
        key: All that they depend on.
        rows: What was measured.
    """

    key: Mapping[str, Any]
    rows: tuple[Row, ...]


class SharedWork:
    """A folder in which runs leave work for each other. A file is named after all that its content depends on.

    Args:
        folder: Where; None keeps nothing.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def tokens(self, key: Mapping[str, Any], make: Callable[[], list[list[int]]]) -> list[list[int]]:
        """Token ids of a text, made once.

        Args:
            key: All that they depend on.
            make: Reads and tokenizes the text.

        Returns:
            One list of ids per stream, as `text.tokenize` gives them.
        """
        if self.folder is None:
            return make()
        path = self._path("tokens", key).with_suffix(".safetensors")
        try:
            stored = load_file(path)
            lengths: list[int] = stored["lengths"].tolist()
            return [ids.tolist() for ids in stored["ids"].split(lengths)]
        except (OSError, SafetensorError):  # not there yet, or cut off by a full disk
            streams = make()
        ids = torch.tensor([token for stream in streams for token in stream], dtype=torch.int32)
        tensors = {"ids": ids, "lengths": torch.tensor([len(stream) for stream in streams])}
        write_atomically(path, lambda temporary: save_file(tensors, temporary))
        return streams

    def rows(self, key: Mapping[str, Any]) -> list[Row] | None:
        """Rows that another run has left, or None.

        Args:
            key: All that they depend on.

        Raises:
            ResultsError: If their file is damaged.
        """
        path = self._path("rows", key).with_suffix(".json")
        if self.folder is None or not path.is_file():
            return None
        return list(_KeptRows.from_json(read_json(path), path).rows)

    def keep_rows(self, key: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Leaves rows for other runs."""
        if self.folder is not None:
            kept = _KeptRows(dict(key), tuple(rows))
            write_json(self._path("rows", key).with_suffix(".json"), kept.to_json())

    def _path(self, kind: str, key: Mapping[str, Any]) -> Path:
        text = json.dumps(key, sort_keys=True, default=str)
        return (self.folder or Path()) / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
