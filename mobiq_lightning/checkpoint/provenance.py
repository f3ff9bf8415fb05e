"""Where a checkpoint and a figure come from: versions, machine, code, source model, calibration text."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import mobiq_lightning

if TYPE_CHECKING:
    from mobiq_lightning.module import ElasticCalibration

_PACKAGES = ("torch", "lightning", "transformers")


def environment() -> dict[str, str]:
    """Versions and machine that something is measured with."""
    return {
        "mobiq_lightning": mobiq_lightning.__version__,
        **{name: version(name) for name in _PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(terse=True),
        "device": device_name(),
        "threads": str(torch.get_num_threads()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name() -> str:
    """Of what models run on here: the GPU, or the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def processor_name() -> str:
    """Of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of this package's code, with ``-dirty`` if it was changed since; None if it was installed without git."""
    package = Path(mobiq_lightning.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) / package.name != package.resolve():
            return None  # a virtual environment in somebody else's repository
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", str(package)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def provenance(module: ElasticCalibration) -> dict[str, Any]:
    """Of a calibrated model.

    Args:
        module: At the end of its fit.
    """
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "source": {
            "name": module.pretrained,
            "weights": module.source.fingerprint,
            "tokenizer": module.source.tokenizer_hash,
        },
        "calibration": {**data.protocol["calibration"], "data_hash": data.calibration_digest},
        "transform": module.transform.describe(),
        "seed": None if seed is None else int(seed),
        "git_commit": git_commit(),
        "environment": environment(),
    }
