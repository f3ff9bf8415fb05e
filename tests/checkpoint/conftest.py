"""What tests of the checkpoint's files share: a checkpoint that is made in a moment."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def uncalibrated(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small model that was sliced without calibration. Not to be changed by tests."""
    return write_checkpoint(make_model(), tmp_path_factory.mktemp("uncalibrated") / "elastic")


@pytest.fixture
def elastic(uncalibrated: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return shutil.copytree(uncalibrated, tmp_path / "elastic")
