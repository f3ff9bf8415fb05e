"""Damaged recipes, grids and results: every reader refuses them with an error of the package, or reads them."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest

from tests.fuzz_readers import Reader, readers
from tests.fuzzing import failures

COUNT = 40
"""Mutants of each file; `python -m benchmarks.fuzz` tries thousands."""


@pytest.fixture(scope="module")
def of_all(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return {reader.name: reader for reader in readers(tmp_path_factory.mktemp("fuzz") / "files")}


@pytest.mark.parametrize(
    "name",
    [
        "recipe", "grid", "results.json", "results.json, policy", "diagnostics.json", "metrics.jsonl", "layer_gains.json",
        "cell.json", "comparison.json", "report, results.json", "report, diagnostics.json", "report, metrics.jsonl",
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_or_read(of_all: dict[str, Reader], name: str, tmp_path: Path) -> None:
    reader = of_all[name]
    folder = Path(shutil.copytree(reader.folder, tmp_path / "files"))

    def read(content: bytes) -> None:
        (folder / reader.file).write_bytes(content)
        reader.read(folder)

    assert failures(read, reader.inputs(Random(name), COUNT // min(reader.cost, 4))) == {}


def test_the_files_that_are_mutated_are_valid(of_all: dict[str, Reader], tmp_path: Path) -> None:
    for number, reader in enumerate(of_all.values()):
        if not reader.name.startswith("drawn"):
            reader.read(Path(shutil.copytree(reader.folder, tmp_path / str(number))))
    assert len(of_all) > 12
