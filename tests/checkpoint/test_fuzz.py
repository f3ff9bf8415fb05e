"""Hundreds of damaged files, and no reader of a checkpoint ends with anything but its own error, or accepts them in silence."""

from __future__ import annotations

import warnings
from pathlib import Path
from random import Random

import pytest

from tests.conftest import make_tokenizer
from tests.fuzz_checkpoints import checkpoint_readers
from tests.fuzz_readers import Reader
from tests.fuzzing import failures

COUNT = 8


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return {
        reader.name: reader for reader in checkpoint_readers(tmp_path_factory.mktemp("fuzz") / "files", make_tokenizer)
    }


@pytest.mark.parametrize("way", ["load", "verify", "inspect", "export"])
def test_damaged_files_are_refused_in_words(readers: dict[str, Reader], way: str) -> None:
    for name, reader in readers.items():
        if not name.startswith(way):
            continue
        path = reader.folder / reader.file
        whole = {file: file.read_bytes() for file in reader.folder.iterdir()}

        def read(content: bytes, reader: Reader = reader, path: Path = path) -> None:
            path.write_bytes(content)
            reader.read(reader.folder)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = failures(read, reader.inputs(Random(name), COUNT))
        for file, content in whole.items():
            file.write_bytes(content)
        assert not found, (name, list(found))
