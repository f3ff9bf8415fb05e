"""What a checkpoint's folder holds, as far as it can be told without reading a tensor: the one entrance of every reader."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobiq_lightning.checkpoint.check import describe_missing, describe_problems, read_header
from mobiq_lightning.checkpoint.claims import exaggerations
from mobiq_lightning.checkpoint.format import ElasticFormat
from mobiq_lightning.checkpoint.own_files import (
    Hashes,
    differing_files,
    links_out,
    own_file,
    read_config,
    read_hashes,
    read_index,
)
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.runs import CONFIG, HASHES, INDEX


@dataclass
class Contents:
    """What a checkpoint's folder holds.

    Args:
        folder: The folder.
        config: Content of config.json.
        elastic: The format that its `quantization_config` describes.
        where: Safetensors files that the index names and that are whole, by name of the tensor in them.
        headers: Entry of each of those tensors in the header of its file: ``dtype``, ``shape``, ``data_offsets``.
        hashes: Content of hashes.json; None if there is none.
        problems: What is wrong, one line each.
    """

    folder: Path
    config: dict[str, Any]
    elastic: ElasticFormat
    where: dict[str, Path] = field(default_factory=dict)
    headers: dict[str, dict[str, Any]] = field(default_factory=dict)
    hashes: Hashes | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def shards(self) -> list[Path]:
        """The files of tensors that are whole, in the order of their names."""
        return sorted(set(self.where.values()))

    def bytes_of(self, name: str) -> int:
        """Size of a tensor in bytes."""
        start, end = self.headers[name]["data_offsets"]
        return int(end - start)

    def require_whole(self, effect: str = "nothing was loaded") -> None:
        """Raises a `CheckpointError` that lists the problems, if there are any.

        Args:
            effect: Consequence of the problems, for the message.
        """
        if self.problems:
            raise CheckpointError(describe_problems(self.folder, self.problems, effect))


def read_contents(folder: Path, compare_files: bool = True) -> Contents:
    """Reads config, index, headers and hashes of a checkpoint, and compares them with each other.

    Args:
        folder: Folder of the checkpoint.
        compare_files: Whether files that are no tensors are compared with hashes.json. That reads them whole.

    Returns:
        What the folder holds, and in `problems` what of it is damaged, missing, left over or leads elsewhere.

    Raises:
        CheckpointError: If config or index cannot be read, so that nothing else can be told.
    """
    config, elastic = read_config(folder)
    found = Contents(folder, config, elastic)
    index = read_index(folder)
    named = set(index.values())
    found.problems += [f"{n} is a link that leads out of {folder}" for n in links_out(folder) if n not in named]
    unreadable: set[str] = set()
    for name in sorted(set(index.values())):
        try:
            path = own_file(folder, name)
            header = read_header(path)
        except CheckpointError as error:
            found.problems.append(str(error))
            unreadable.add(name)
            continue
        found.problems += [f"{name}: {tensor} is in two files" for tensor in header if tensor in found.where]
        found.where |= dict.fromkeys(header, path)
        found.headers |= header
    where, readable = found.where, {*index.values()} - unreadable
    found.problems += describe_missing(name for name, file in index.items() if name not in where and file in readable)
    found.problems += [f"{path.name}: {name} is not in the index" for name, path in where.items() if name not in index]
    if not unreadable:
        found.problems += exaggerations(config, elastic, found.where)
    if not compare_files:
        return found
    try:
        found.hashes = read_hashes(folder)
    except CheckpointError as error:
        found.problems.append(str(error))
    if found.hashes is not None:
        files = found.hashes.files
        found.problems += differing_files(folder, files)
        found.problems += [
            f"{name} has no hash in {HASHES}"
            for name in (CONFIG, INDEX)
            if (folder / name).exists() and name not in files
        ]
        found.problems += [
            f"{path.name}: {tensor} has no hash in {HASHES}"
            for tensor, path in found.where.items()
            if tensor not in found.hashes.tensors
        ]
    return found
