"""Files that may be damaged or hostile: read within limits, with an error that says what is wrong with which file.

Whatever the package reads that it has not made in the same process goes through here: JSON, YAML and plain text are taken
from regular files alone, up to a size and a depth that no honest file reaches.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from mobiq_lightning.errors import FileError

TEXT_BYTES = 64 * 2**20
"""Largest text, JSON or YAML file that is read, in bytes."""
YAML_BYTES = 2**20
"""Largest YAML file that is read, in bytes: parsing takes some 10 microseconds a byte."""
DEPTH = 64
"""How deep lists and mappings may lie in each other."""
_DEEP = re.compile(rf"[\[{{](?:[ \t\n]{{0,8}}[\[{{]){{{DEPTH}}}")
"""Brackets that open one after the other; PyYAML takes seconds to find that they are too many."""
YAML_VALUES = 100_000
"""How many values a YAML file may stand for once its aliases are written out."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file to read its bytes; nothing that waits for somebody, as a named pipe does, is opened.

    Raises:
        FileError: If it is missing, is no regular file, or may not be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # a ValueError for a name with a zero byte
        raise FileError(f"{path} {_reason(error)}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileError(f"{path} is {_kind(path)}, not a regular file")
    return os.fdopen(handle, "rb")


def read_text(path: Path, limit: int = TEXT_BYTES) -> str:
    """What a text file holds.

    Args:
        path: The file, in UTF-8, with or without a mark in front that says so.
        limit: Largest size in bytes.

    Raises:
        FileError: If it cannot be read, is larger, or is not UTF-8.
    """
    with open_regular(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise FileError(f"{path} {_reason(error)}") from error
    if len(content) > limit:
        raise FileError(f"{path} has more than {limit} bytes, which is more than any such file needs")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_json(path: Path, limit: int = TEXT_BYTES) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
        limit: Largest size in bytes.

    Raises:
        FileError: If it cannot be read, is larger, is not JSON, or is nested deeper than `DEPTH`.
    """
    return parse_json(read_text(path, limit), str(path))


def parse_json(text: str, where: str) -> Any:
    """What a JSON text says.

    Args:
        text: The text.
        where: What it is, for the message.

    Raises:
        FileError: If it is not JSON, or is nested deeper than `DEPTH`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where} is not valid JSON ({_first_line(error)})") from error
    if _depth(value) > DEPTH:
        raise FileError(f"{where} is nested more than {DEPTH} deep")
    return value


def read_mapping(path: Path, limit: int = TEXT_BYTES) -> dict[str, Any]:
    """What a JSON file holds that should be a mapping.

    Args:
        path: The file.
        limit: Largest size in bytes.

    Raises:
        FileError: If `read_json` raises it, or the file holds something else.
    """
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise FileError(f"{path} holds {type(value).__name__} where a mapping is expected")
    return value


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values, lists and mappings; nothing else is ever made of it.

    Raises:
        FileError: If it cannot be read, is not YAML, is larger than `YAML_BYTES`, nested deeper than `DEPTH`, or stands for
            more than `YAML_VALUES` values.
    """
    return parse_yaml(read_text(path, YAML_BYTES), str(path))


def parse_yaml(text: str, where: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """What a YAML text says: plain values, lists and mappings.

    Args:
        text: The text.
        where: What it is, for the message.
        loader: Loader of PyYAML, a safe one.

    Raises:
        FileError: If it is not YAML, is larger than `YAML_BYTES`, nested deeper than `DEPTH`, or stands for more than
            `YAML_VALUES` values.
    """
    if len(text) > YAML_BYTES:
        raise FileError(f"{where} has more than {YAML_BYTES} characters, which is more than any such file needs")
    if _DEEP.search(text):
        raise FileError(f"{where} is nested more than {DEPTH} deep")
    try:
        value = yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise FileError(f"{where} is not valid YAML: {_yaml_problem(error)}") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # a number or date that Python cannot hold
        raise FileError(f"{where} is not valid YAML: {_first_line(error)}") from error
    _check_size(value, where)
    return value


def _check_size(value: Any, where: str) -> None:
    """Refuses what aliases make endless, too deep or too large; each value is looked at once, however often it is named."""
    sizes: dict[int, int] = {}
    open_now: set[int] = set()

    def size(inner: Any, depth: int) -> int:
        if not isinstance(inner, (dict, list, tuple, set)):
            return 1
        if depth > DEPTH:
            raise FileError(f"{where} is nested more than {DEPTH} deep")
        key = id(inner)
        if key in open_now:
            raise FileError(f"{where} holds a value that contains itself")
        if key not in sizes:
            open_now.add(key)
            parts = [*inner.keys(), *inner.values()] if isinstance(inner, dict) else inner
            sizes[key] = 1 + sum(size(part, depth + 1) for part in parts)
            open_now.discard(key)
        return sizes[key]

    total = size(value, 1)
    if total > YAML_VALUES:
        raise FileError(f"{where} stands for {total} values, of which at most {YAML_VALUES} are read")


def _depth(value: Any) -> int:
    """How deep lists and mappings lie in each other."""
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, (dict, list))]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


def _kind(path: Path) -> str:
    """What a path that is no regular file is, in words."""
    if path.is_dir():
        return "a folder"
    return "a named pipe" if path.is_fifo() else "a device or socket"


def _reason(error: Exception) -> str:
    """Why a file could not be opened or read, as the end of a sentence that begins with its name."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read ({(getattr(error, 'strerror', None) or _first_line(error)).lower()})"


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong in a YAML text, and in which line, as one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
    return _first_line(error)


def is_file(path: str | Path) -> bool:
    """Whether there is a file of that name, of whatever kind but a folder; False for a name that no file can have."""
    try:
        return Path(path).exists() and not Path(path).is_dir()
    except (OSError, ValueError):  # too long, or a zero byte
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
