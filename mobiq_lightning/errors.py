"""What can go wrong, one exception class per kind. Every message says what happened, where, the numbers, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class MobiqError(Exception):
    """Base of every error that is the user's to mend; the command line prints it without a traceback."""


class FileError(MobiqError):
    """A file that cannot be read as what it should be: missing, no regular file, too large, or not text, JSON or YAML."""


class DiskError(MobiqError):
    """Something that the system refuses: a full disk, a read-only one, no rights, too many open files."""


class RecipeError(MobiqError):
    """A recipe key, value or class name that cannot be used."""


class ModelError(MobiqError):
    """A source model that cannot be sliced: already quantized, unknown layout, damaged weights, wrong tokenizer."""


class DataError(MobiqError):
    """Text that cannot be read, or is too short, or does not fit the tokenizer."""


class RunFolderError(MobiqError):
    """The run folder holds something else than what this command would continue."""


class CutShortError(MobiqError):
    """A run that a limit of the trainer, or a callback, ended before its time; what it has finished is kept."""


class NonFiniteError(MobiqError):
    """NaN or infinity while a block was calibrated.

    Args:
        message: What was seen.
        block: Index of the block, from 0; None if the whole model was trained.
    """

    def __init__(self, message: str, block: int | None) -> None:
        super().__init__(message)
        self.block = block


class GuardError(MobiqError):
    """A calibration that a guard has stopped: worse than none, or with a router that does not route."""


class BitsError(MobiqError):
    """A bit-width outside of what the checkpoint holds."""


class CheckpointError(MobiqError):
    """An elastic checkpoint or a training checkpoint that is damaged, incomplete or from a newer version."""


class UntrustedClassError(CheckpointError):
    """A checkpoint that names a class of somebody's own, which the caller has not said may be imported."""


class ResultsError(MobiqError):
    """A file of figures, such as results.json, that is damaged, incomplete or from another version."""


class KernelError(MobiqError):
    """Kernels that cannot be used as asked, that are wrong on this device, or that could not be measured."""


class MissingExtraError(MobiqError, ImportError):
    """A command or class that needs packages which are not installed."""


def nearest(name: str, accepted: Iterable[str], count: int = 3) -> str:
    """``"Did you mean a, b?"`` for the accepted names closest to `name`, or an empty string if none is close."""
    name, accepted = str(name), [str(key) for key in accepted]  # keys of YAML may be numbers
    found = difflib.get_close_matches(name, accepted, n=count, cutoff=0.5)
    if not found:  # a full key against keys that differ only in their last word
        tails = {key.rsplit(".", 1)[-1]: key for key in accepted}
        found = [tails[t] for t in difflib.get_close_matches(name.rsplit(".", 1)[-1], tails, n=count, cutoff=0.6)]
    return f"Did you mean {' or '.join(repr(f) for f in found)}?" if found else ""


def shown(value: Any, width: int = 60) -> str:
    """A value in a message: on one line as Python writes it, cut to `width` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists that lie too deep in each other
        text = f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= width else f"{text[: width - 3]}..."
