"""Compares the tensors in files with what they should be: names, shapes, bytes. Both loading and `verify` use it."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobiq_lightning.errors import CheckpointError, FileError
from mobiq_lightning.input_files import open_regular, parse_json
from mobiq_lightning.packing import TensorKind, carrier_of, kind_of, plane_of

_SHOWN = 6  # problems that a message lists
OTHER_FILE = " is not what was written"
"""End of the problem of a file that is no tensor and has other bytes than hashes.json says."""
HEADER_BYTES = 100 * 10**6
"""Largest header of a safetensors file that is read, in bytes; the library reads no larger one either."""
_THREADS = 4  # hashlib and the file system work outside of Python's lock
_FLOATING = ("F16", "BF16", "F32", "F64")
_DTYPES = {torch.uint8: ("U8",), torch.int64: ("I64",), torch.int32: ("I32",), torch.bool: ("BOOL",)}
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
        dtypes: What the header may call its dtype: any floating one stands for any other.
        required: Whether the tensor must be there.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    required: bool

    @classmethod
    def of(cls, tensor: Tensor, required: bool) -> Expected:
        """What is expected of the tensor of a file that is loaded into `tensor`."""
        return cls(tuple(tensor.shape), _DTYPES.get(tensor.dtype, _FLOATING), required)


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
    advice = "Copy it again from where it came from; if it is in a run folder of yours, `fit` with its recipe builds it again"
    if all(problem.endswith(OTHER_FILE) for problem in problems):
        advice += (
            f". If you changed the file yourself, mobiq_lightning.load({str(folder)!r}, check_hashes=False)"
            f".save_pretrained({str(folder)!r}) makes hashes anew"
        )
    return f"{folder} is damaged; {effect}.\n  " + "\n  ".join(problems[:_SHOWN]) + f"{more}\n{advice}"


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
    where: dict[str, Path] = {}
    headers: dict[str, dict[str, Any]] = {}
    for path in files:
        try:
            header = read_header(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        where |= dict.fromkeys(header, path)
        headers |= header
    if problems:  # what is missing is in the file that cannot be read
        return problems
    problems = shape_problems(headers, where, expected)
    if hashes is not None and not problems:
        problems = [f"{where[name].name}: {name} has no hash" for name in where if name not in hashes]
        known = {name: path for name, path in where.items() if name in expected and name in hashes}
        problems += [
            f"{known[name].name}: the bytes of {name} are not those that were written"
            for name in differing_tensors(known, hashes)
        ]
    return problems


def shape_problems(
    headers: Mapping[str, Mapping[str, Any]], where: Mapping[str, Path], expected: Mapping[str, Expected]
) -> list[str]:
    """Lists how headers differ from the tensors that are expected, one line for each problem.

    Args:
        headers: Entries of tensors in the headers of their files, by name.
        where: The files, by name of the tensor.
        expected: Tensors that will be read, by name.
    """
    problems: list[str] = []
    for name, entry in headers.items():
        wanted = expected.get(name)
        if wanted is None:
            if plane_of(name) is None:
                problems.append(f"{where[name].name}: {name} is not part of this model")
        elif tuple(entry["shape"]) != wanted.shape:
            problems.append(f"{where[name].name}: {name} has shape {entry['shape']}, should have {list(wanted.shape)}")
        elif entry["dtype"] not in wanted.dtypes:
            problems.append(f"{where[name].name}: {name} has dtype {entry['dtype']}")
    missing = [name for name, wanted in expected.items() if wanted.required and name not in headers]
    return problems + describe_missing(missing)


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
        CheckpointError: If the file is missing, or is not as long as its header says, or has none that can be read.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0]
            if length > size:
                raise ValueError(f"its header should be {length} bytes long, the file has {size}")
            if length > HEADER_BYTES:
                raise ValueError(f"its header should be {length} bytes long; headers have at most {HEADER_BYTES}")
            header = parse_json(file.read(length).decode("utf-8"), "its header")
        if not isinstance(header, dict):
            raise ValueError("its header is no mapping")
        header.pop("__metadata__", None)
        ends = [_end_of(name, entry) for name, entry in header.items()]
        end = 8 + length + max(ends, default=0)
        if end != size:
            raise ValueError(f"it should be {end} bytes long and has {size}")
        with safe_open(path, framework="pt"):  # the library's own checks of the header
            pass
    except FileError as error:
        said = str(error).replace(f"{path}", path.name)
        raise CheckpointError(said if path.name in said else f"{path.name} is cut off or damaged: {said}") from error
    except (ValueError, OSError, struct.error, SafetensorError) as error:
        raise CheckpointError(f"{path.name} is cut off or damaged: {error}") from error
    return header


def _end_of(name: str, entry: Any) -> int:
    """Where the bytes of a tensor end, counted from the end of the header; raises ValueError if its entry makes no sense."""
    fields = entry if isinstance(entry, dict) else {}
    offsets: Any = fields.get("data_offsets")
    sizes_fit = len(fields) == 3 and _are_sizes(fields.get("shape")) and _are_sizes(offsets) and len(offsets) == 2
    if not sizes_fit or not isinstance(fields.get("dtype"), str):
        raise ValueError(f"its header says of {name!r}: {str(entry)[:80]}")
    return int(offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def hash_tensor(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes, in hex; the tensor must be on the host."""
    data: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


def describe_missing(names: Iterable[str]) -> list[str]:
    """One line for each missing tensor, with one for all those of one router, transform or set of tables."""
    lines: dict[str, None] = {}
    for name in names:
        part = _PARTS_OF_INPUTS.get(kind_of(name))
        lines[f"{name} is missing" if part is None else part.format(carrier_of(name))] = None
    return list(lines)
