"""Describes where a checkpoint comes from: versions, machine, code, source model, calibration text."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from mobiq_lightning.environment import environment
from mobiq_lightning.sources import Source
from mobiq_lightning.strategies.transform_base import Transform


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
    return {
        "source": {"name": source.name, "weights": source.fingerprint, "tokenizer": source.tokenizer_hash},
        "calibration": calibration,
        "transform": transform.describe(),
        "seed": None if seed is None else int(seed),
        "git_commit": git_commit(),
        "environment": environment(),
    }
