"""The text of the tables: the beginning of WikiText-2's training split, and its test split, as files."""

from __future__ import annotations

import json
from pathlib import Path

from mobiq_lightning.console import say
from mobiq_lightning.files import sha256, write_text
from mobiq_lightning.sources.text import Split, read_documents

LIMIT = 2**20
"""Bytes that the file of the training split may have: 128 windows are drawn from it."""
SHA256 = {
    "train.jsonl": "179353c811261ea8094930c7d1ab58a4b2b7a3716242a5c157f09ae372d997ed",
    "test.jsonl": "a26bd387e6f1d19e45ddbd7fe6fd5aef3f97f457863f0973e3327e68ac6daee8",
}
"""Of the files that the committed tables were made with."""


def excerpt(folder: Path) -> tuple[Path, Path]:
    """Gives the calibration and the evaluation text below `folder`; what is not there is made of WikiText-2 on the hub.

    Each line of a file is ``{"text": ...}``, a row of the data set. Of the training split there are as many rows, from the
    first, as fit into 2^20 bytes; of the test split all.

    Raises:
        DataError: If the data set is neither in the local cache nor reachable.
    """
    train = _written(folder / "train.jsonl", "train", LIMIT)
    return train, _written(folder / "test.jsonl", "eval", None)


def _written(path: Path, split: Split, limit: int | None) -> Path:
    if not path.is_file():
        rows = read_documents("wikitext2", split, "source")
        lines = [json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(lines if limit is None else _first(lines, limit)))
    if sha256(path) != SHA256[path.name]:
        say(
            f"{path} is not the text of the committed tables (SHA-256 {SHA256[path.name][:12]}...): figures will differ."
        )
    return path


def _first(lines: list[str], limit: int) -> list[str]:
    """The first lines, of at most so many bytes together."""
    size = 0
    for index, line in enumerate(lines):
        size += len(line.encode())
        if size > limit:
            return lines[:index]
    return lines
