"""What the values of options may be, told before anything heavy is imported."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from mobiq_lightning.errors import CheckpointError, RecipeError, nearest, shown
from mobiq_lightning.input_files import is_file
from mobiq_lightning.runs import CONFIG, ELASTIC

MOST_BITS = 8
"""Bits of all slices together at most."""
_PATH, _PART = 4000, 255
"""Bytes of a path, and of a name in it, that a file system takes at most."""


def number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """The type of an option that takes a finite number.

    Args:
        low: The lowest.
        high: The highest.
        above: Whether `low` itself is too low.
    """

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
            most = f" and at most {high:,g}" if math.isfinite(high) else ""
            raise ArgumentTypeError(
                f"{shown(text)}; a number {'above' if above else 'of at least'} {low:g}{most} is expected"
            )
        return value

    return read


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # no number, or one of thousands of digits
            value = low - 1
        if not low <= value <= high:
            raise ArgumentTypeError(f"{shown(text)}; a whole number from {low} to {high:,} is expected")
        return value

    return read


def temperature(text: str) -> float:
    """The type of a temperature: 0, or one at which sampling does not overflow."""
    value = number(0, 1000)(text)
    if 0 < value < 0.001:
        raise ArgumentTypeError(f"{shown(text)}; 0, or a number of at least 0.001 and at most 1,000 is expected")
    return value


def folder(text: str) -> str:
    """The type of a folder that is written to.

    Raises:
        ArgumentTypeError: If nothing can have that name.
    """
    if not text.strip() or not _can_be_a_path(text):
        raise ArgumentTypeError(f"{shown(text)} is no name that a folder can have")
    return text


def check_run(text: str) -> None:
    """Looks whether RUN can be what it should: a run folder, an elastic checkpoint, or a hub id.

    Raises:
        RecipeError: If it is empty.
        CheckpointError: If it can be none of these: no such folder, or one without a checkpoint.
    """
    if not text.strip():
        raise RecipeError("the run is empty; give a run folder, an elastic checkpoint, or a hub id, as in runs/tiny")
    if not _can_be_a_path(text):
        raise CheckpointError(f"{shown(text)} is no name that a run folder or a checkpoint can have")
    path = Path(text).expanduser()
    if any(is_file(path / name) for name in (CONFIG, f"{ELASTIC}/{CONFIG}")):
        return
    missing = f"{text} holds no elastic checkpoint; a finished `fit` leaves one in <run folder>/{ELASTIC}"
    if path.exists():
        raise CheckpointError(missing)
    beside = [str(found.parents[1]) for found in path.parent.glob(f"*/{ELASTIC}/{CONFIG}")]
    if beside or path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise CheckpointError(f"{missing}. {nearest(text, beside)}".rstrip(". "))


def _can_be_a_path(text: str) -> bool:
    try:
        parts = [part.encode() for part in text.split("/")]
    except UnicodeEncodeError:
        return False
    return text.isprintable() and sum(map(len, parts)) < _PATH and all(len(part) <= _PART for part in parts)
