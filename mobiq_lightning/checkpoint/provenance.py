"""Describes where a checkpoint comes from: versions, machine, code, source model, calibration text."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobiq_lightning.checkpoint.own_files import own_file
from mobiq_lightning.environment import environment
from mobiq_lightning.runs import PROVENANCE, Record, at_least, read_json, without_place
from mobiq_lightning.sources import Source
from mobiq_lightning.strategies.transform_base import Transform


@dataclass(frozen=True)
class _Source(Record):
    name: str
    weights: str
    tokenizer: str
    bytes: int | None = field(default=None, metadata=at_least(0))


@dataclass(frozen=True)
class _Calibration(Record):
    data: str
    n_samples: int
    seq_len: int
    data_hash: str


@dataclass(frozen=True)
class _Environment(Record):
    mobiq_lightning: str
    torch: str
    transformers: str
    python: str
    date: str
    device: str


@dataclass(frozen=True)
class _Provenance(Record):
    """What readers of provenance.json rely on; the file says more."""

    source: _Source
    calibration: _Calibration
    seed: int | None
    git_commit: str | None
    environment: _Environment


def read_provenance(folder: Path) -> Mapping[str, Any]:
    """Content of a checkpoint's provenance.json; empty if it has none.

    Raises:
        CheckpointError: If it is no regular file of the folder.
        ResultsError: If it is damaged, or from another version.
    """
    if not (folder / PROVENANCE).exists():
        return {}
    path = own_file(folder, PROVENANCE)
    stored: dict[str, Any] = read_json(path)
    _Provenance.from_json(stored, path)
    return stored


def git_commit() -> str | None:
    """The git commit of this package's code, with ``-dirty`` if files were changed since; None outside a repository."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) / package.name != package.resolve():
            return None  # a virtual environment in somebody else's repository
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", str(package)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_provenance(source: Source, calibration: dict[str, Any], transform: Transform) -> dict[str, Any]:
    """Makes the content of provenance.json, which says how a checkpoint was made.

    Args:
        source: The model that was sliced.
        calibration: Protocol of the calibration text, and its hash as ``data_hash``.
        transform: Transform of weights and inputs before slicing.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    about = {"name": without_place(source.name), "weights": source.fingerprint, "tokenizer": source.tokenizer_hash}
    return {
        "source": {**about, **({"bytes": source.n_bytes} if source.n_bytes else {})},
        "calibration": calibration,
        "transform": transform.describe(),
        "seed": None if seed is None else int(seed),
        "git_commit": git_commit(),
        "environment": environment(),
    }
