"""Compares the tensors in files with what they should be: names, shapes, bytes. Both loading and `verify` use it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.packing import TensorKind, carrier_of, kind_of, plane_of

_SHOWN = 6  # problems that a message lists
_THREADS = 4  # hashlib and the file system work outside of Python's lock
_PARTS_OF_INPUTS: dict[TensorKind, str] = {
    "router": "the router of {} is missing",
    "transform": "the transform of {} is missing",
    "thresholds": "the thresholds of {} are missing",
    "budgets": "the thresholds of {} are missing",
}


class Expected(NamedTuple):
    """What a tensor of a checkpoint should be.

    Args:
        shape: Shape of the tensor.
        is_bytes: Whether its dtype is uint8; else it may be any floating dtype.
        required: Whether the tensor must be there.
    """

    shape: tuple[int, ...]
    is_bytes: bool
    required: bool


def check_tensors(files: Sequence[Path], expected: Mapping[str, Expected], hashes: Mapping[str, str] | None) -> None:
    """Checks that files hold the tensors that are expected.

    Args:
        files: Safetensors files.
        expected: Tensors that will be read, by name.
        hashes: SHA-256 of every tensor's bytes in hex, by name; None not to compare them.

    Raises:
        CheckpointError: If something is damaged, missing or left over; the message names it.
    """
    problems = tensor_problems(files, expected, hashes)
    if problems:
        raise CheckpointError(describe_problems(files[0].parent, problems))


def describe_problems(folder: Path, problems: Sequence[str], effect: str = "nothing was loaded") -> str:
    """The message of an error that lists the problems of a checkpoint, the first six in full.

    Args:
        folder: Folder of the checkpoint.
        problems: Problems, one line each.
        effect: Consequence of the problems, such as ``nothing was loaded``.
    """
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return (
        f"{folder} is damaged; {effect}.\n  " + "\n  ".join(problems[:_SHOWN]) + more + "\n"
        "Copy or export the checkpoint again"
    )


def tensor_problems(
    files: Iterable[Path], expected: Mapping[str, Expected], hashes: Mapping[str, str] | None
) -> list[str]:
    """Lists how the tensors in files differ from what is expected, one line for each problem; empty if they do not.

    Args:
        files: Safetensors files.
        expected: Tensors that will be read, by name.
        hashes: SHA-256 of every tensor's bytes in hex, by name; None not to compare them.
    """
    problems: list[str] = []
    found: dict[str, Path] = {}
    unreadable = False
    for path in files:
        try:
            header = read_header(path)
        except CheckpointError as error:
            problems.append(str(error))
            unreadable = True
            continue
        found |= dict.fromkeys(header, path)
        for name, entry in header.items():
            wanted = expected.get(name)
            if wanted is None:
                continue
            if tuple(entry["shape"]) != wanted.shape:
                problems.append(f"{path.name}: {name} has shape {entry['shape']}, should have {list(wanted.shape)}")
            elif (entry["dtype"] == "U8") != wanted.is_bytes:
                problems.append(f"{path.name}: {name} has dtype {entry['dtype']}")
    if not unreadable:  # what is missing is in the file that cannot be read
        missing = [name for name, wanted in expected.items() if wanted.required and name not in found]
        problems += _describe_missing(missing)
        others = [name for name in found if name not in expected and plane_of(name) is None]
        problems += [f"{found[name].name}: {name} is not part of this model" for name in others]
    if hashes is not None and not problems:
        known = {name: path for name, path in found.items() if name in expected and name in hashes}
        problems += [
            f"{known[name].name}: the bytes of {name} are not those that were written"
            for name in differing_tensors(known, hashes)
        ]
    return problems


def differing_tensors(where: Mapping[str, Path], hashes: Mapping[str, str]) -> list[str]:
    """Names of the tensors whose bytes have another SHA-256 than expected.

    Args:
        where: Safetensors files by name of the tensor that they hold.
        hashes: Expected SHA-256 in hex, by name of the tensor.
    """
    by_file: dict[Path, list[str]] = {}
    for name, path in where.items():
        by_file.setdefault(path, []).append(name)

    def differing(path: Path) -> list[str]:
        return [name for name, tensor in read_tensors(path, by_file[path]) if hash_tensor(tensor) != hashes[name]]

    with ThreadPoolExecutor(_THREADS) as pool:
        return [name for names in pool.map(differing, by_file) for name in names]


def read_tensors(path: Path, names: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
    """Reads the named tensors of a safetensors file one after the other, each as its name and the tensor."""
    with safe_open(path, framework="pt") as file:
        for name in names:
            yield name, file.get_tensor(name)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the header of a safetensors file: by name, ``{"dtype", "shape", "data_offsets"}``; no tensor is read.

    Raises:
        CheckpointError: If the file is missing, or is not as long as its header says, or has none.
    """
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            size = path.stat().st_size
            if length > size:
                raise ValueError(f"its header should be {length} bytes long, the file has {size}")
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ValueError(f"it should be {end} bytes long and has {size}")
        with safe_open(path, framework="pt"):  # the library's own checks of the header
            pass
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, SafetensorError) as error:
        raise CheckpointError(f"{path.name} is cut off or damaged: {error}") from error
    return header


def hash_tensor(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes, in hex; the tensor must be on the host."""
    data: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


def _describe_missing(names: Sequence[str]) -> list[str]:
    """One line for each missing tensor, with one for all those of one router, transform or set of tables."""
    lines: dict[str, None] = {}
    for name in names:
        part = _PARTS_OF_INPUTS.get(kind_of(name))
        lines[f"{name} is missing" if part is None else part.format(carrier_of(name))] = None
    return list(lines)
