"""The files of a checkpoint: found in its own folder alone, and read within limits, whatever the folder was made by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mobiq_lightning.checkpoint.check import OTHER_FILE, read_header
from mobiq_lightning.checkpoint.format import QUANT_METHOD, ElasticFormat, is_elastic
from mobiq_lightning.errors import CheckpointError, FileError
from mobiq_lightning.files import sha256
from mobiq_lightning.input_files import open_regular, read_mapping
from mobiq_lightning.runs import COMPANIONS, CONFIG, HASHES, INDEX, LATER

SINGLE = "model.safetensors"
"""File of the tensors where transformers saved a model that needs no index."""
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
"""Folders of the hub's cache: files in the first are links to those in the second."""


class Hashes(NamedTuple):
    """Content of hashes.json.

    Args:
        files: SHA-256 of each file in hex, by its name in the folder.
        tensors: SHA-256 of each tensor's bytes in hex, by its name.
    """

    files: dict[str, str]
    tensors: dict[str, str]


def own_file(folder: Path, name: object, nested: bool = False) -> Path:
    """The path of a file that a checkpoint names, which must be a regular file in the folder of the checkpoint.

    Args:
        folder: Folder of the checkpoint.
        name: Name that one of its files gives.
        nested: Whether the file may lie in a folder within that of the checkpoint.

    Raises:
        CheckpointError: If the name leads out of the folder, also by a link, or there is no such regular file.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise CheckpointError(f"{name!r} is no name of a file in {folder}")
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts or (len(parts) != 1 and not nested):
        raise CheckpointError(f"{name!r} names a file outside of {folder}; a checkpoint names files of its own folder")
    path = folder / name
    if leads_out(path, folder):
        raise CheckpointError(
            f"{name} is a link that leads out of {folder}; put the file itself there, if you trust it"
        )
    try:
        open_regular(path).close()
    except FileError as error:
        raise CheckpointError(str(error).replace(f"{folder}/", "", 1)) from error
    return path


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path in a folder is, or goes through, a link out of it. The links of the hub's cache do not count."""
    home = folder.resolve()
    blobs = [above.parents[1] / _BLOBS for above in (home, *home.parents) if above.parent.name == _SNAPSHOTS]
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return True
    return not any(target.is_relative_to(place) for place in [home, *blobs])


def links_out(folder: Path) -> list[str]:
    """Names of links that lead out of a checkpoint's folder, under names that somebody would read whoever else names them."""
    patterns = ("*.json", "*.safetensors", "*.md", "*.yaml", *COMPANIONS)
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_symlink()}
    return sorted(path.relative_to(folder).as_posix() for path in found if leads_out(path, folder))


def is_hub_snapshot(folder: Path) -> bool:
    """Whether a folder is one of the hub's cache, in which files lie that somebody has asked for, and not all."""
    home = folder.resolve()
    return home.parent.name == _SNAPSHOTS and home.parents[1].name.startswith("models--")


def read_config(folder: Path) -> tuple[dict[str, Any], ElasticFormat]:
    """Reads the config.json of a checkpoint.

    Returns:
        All of it, and the format that its `quantization_config` describes.

    Raises:
        CheckpointError: If it cannot be read, or is not that of an elastic checkpoint; the message says why.
    """
    config = _mapping(folder, CONFIG)
    stored = config.get("quantization_config")
    if not is_elastic(stored):
        raise CheckpointError(f"{folder} holds no elastic model (its quant_method is not {QUANT_METHOD!r})")
    return config, ElasticFormat.from_json(stored)


def read_index(folder: Path) -> dict[str, str]:
    """Which file of a checkpoint each tensor is in: file names by name of the tensor.

    A model that transformers saved in one file has no index; what is in the file is where the index would say.

    Raises:
        CheckpointError: If the index cannot be read, or names anything but files of tensors beside it.
    """
    if not (folder / INDEX).exists() and (folder / SINGLE).exists():
        return dict.fromkeys(read_header(own_file(folder, SINGLE)), SINGLE)
    weight_map = _mapping(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX}: weight_map should say which file each tensor is in, and does not")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or PurePosixPath(file).name != file:
            raise CheckpointError(f"{INDEX}: {name} is said to be in {file!r}, which is no safetensors file beside it")
    return weight_map


def read_hashes(folder: Path) -> Hashes | None:
    """The hashes of a checkpoint; None if it has no hashes.json.

    Of a checkpoint in the hub's cache it is downloaded if it is not there yet: transformers fetches the weights alone.

    Raises:
        CheckpointError: If hashes.json cannot be read.
    """
    if not (folder / HASHES).is_symlink() and not (folder / HASHES).exists() and not _download(folder, HASHES):
        return None
    stored = _mapping(folder, HASHES)
    parts = [stored.get("files"), stored.get("tensors")]
    if not all(isinstance(part, dict) and all(isinstance(v, str) for v in part.values()) for part in parts):
        raise CheckpointError(f"{HASHES} cannot be read: files and tensors should map names to hashes")
    return Hashes(*parts)  # type: ignore[arg-type]


def content_hash(folder: Path) -> str | None:
    """Hash of what a checkpoint computes: its tensors, and what config.json says of them; None if it has no hashes.json.

    A checkpoint that is built again from the same training checkpoint has the same one.

    Raises:
        CheckpointError: If config.json or hashes.json cannot be read.
    """
    hashes = read_hashes(folder)
    if hashes is None:
        return None
    config, _ = read_config(folder)
    said = json.dumps([hashes.tensors, config["quantization_config"]], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def differing_files(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """How the files of a checkpoint differ from what was written, one line for each that does.

    Args:
        folder: Folder of the checkpoint. In one of the hub's cache, files that nobody has asked for yet are not missed.
        hashes: SHA-256 in hex, by name of the file.
    """
    problems = []
    partial = is_hub_snapshot(folder)
    for name, expected in hashes.items():
        try:
            path = own_file(folder, name, nested=True)
        except CheckpointError as error:
            if not (partial and str(error).endswith("is missing")):
                problems.append(str(error))
            continue
        if sha256(path) != expected:
            problems.append(f"{name}{OTHER_FILE}")
    return problems


def unhashed_files(folder: Path, hashes: Hashes, shards: Iterable[str]) -> list[str]:
    """Names of what lies in a checkpoint's folder and is no part of it: it has no hash and is not written later either."""
    known = {*shards, *LATER, *hashes.files}
    return sorted(
        name
        for path in folder.rglob("*")
        if not path.is_dir() or path.is_symlink()
        if (name := path.relative_to(folder).as_posix()) not in known
    )


def _mapping(folder: Path, name: str) -> dict[str, Any]:
    try:
        return read_mapping(own_file(folder, name))
    except FileError as error:
        raise CheckpointError(f"{name} cannot be read: {str(error).replace(f'{folder}/', '', 1)}") from error


def _download(folder: Path, name: str) -> bool:
    """Fetches a file of the hub into the cache, beside those of its repository that are there; False if it cannot be had."""
    if not is_hub_snapshot(folder):
        return False
    home = folder.resolve()
    repository = home.parents[1]
    from huggingface_hub import hf_hub_download

    try:
        repo_id = repository.name.removeprefix("models--").replace("--", "/")
        hf_hub_download(repo_id, name, revision=home.name, cache_dir=repository.parent)
    except Exception:  # noqa: BLE001 - whatever keeps it away, it is not here, and whoever asks says so
        return False
    return (folder / name).exists()
