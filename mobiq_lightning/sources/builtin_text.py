"""The built-in text: CPython's documentation of itself; nothing is downloaded. Reading it takes two to four seconds."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mobiq_lightning.errors import DataError

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
_SHORTEST = 200  # characters; below that it is mostly signatures
_HELDOUT_PERCENT = 8
_SHINGLE = 12  # words
_REPEATED = 0.2  # share of a held-out document's shingles that training documents may hold
_LEAST_CHARACTERS = 200_000  # a stripped-down Python without sources has less


def builtin_documents(split: Literal["train", "heldout"]) -> list[str]:
    """Gives English documents of at least 200 characters: standard library docstrings and the topics of `help()`.

    They are sorted, without duplicates, and the same in every process of one Python installation; other installations
    have other text. A hash decides each text's split; held-out texts that largely repeat training text are in neither.

    Args:
        split: Part of the text: ``train`` (about 1.6 million characters) or ``heldout`` (about 0.1 million).

    Raises:
        DataError: If the split is unknown, or this Python has no standard library sources to read.
    """
    if split not in ("train", "heldout"):
        raise DataError(f"The built-in text has no split {split!r}; it has 'train' and 'heldout'")
    return list(_splits()[split])


@lru_cache(maxsize=1)
def _splits() -> dict[str, tuple[str, ...]]:
    return read_splits(Path(sysconfig.get_paths()["stdlib"]))


def read_splits(library: Path) -> dict[str, tuple[str, ...]]:
    """Reads the docstrings and help topics of a folder of Python sources, by split: ``train`` and ``heldout``.

    Args:
        library: Folder whose sources are read, at any depth; tests and installed packages within it are left out.

    Raises:
        DataError: If the sources hold fewer than 200,000 characters of documents.
    """
    documents = sorted({text for text in _read(library) if len(text) >= _SHORTEST})
    if (found := sum(map(len, documents))) < _LEAST_CHARACTERS:
        raise DataError(
            f"The built-in text is read from the sources of Python's standard library, but {library} holds "
            f"only {found} characters of it. Name text files in data.source and data.eval_source, and a model"
        )
    hashes = {text: int(hashlib.sha256(text.encode()).hexdigest(), 16) for text in documents}
    heldout = {text: _shingles(text) for text in documents if hashes[text] % 100 < _HELDOUT_PERCENT}
    train = tuple(text for text in documents if text not in heldout)
    seen = {shingle for text in train for shingle in _shingles(text)}
    new = tuple(text for text, own in heldout.items() if len(own & seen) <= _REPEATED * len(own))
    return {"train": train, "heldout": new}


def _read(library: Path) -> Iterator[str]:
    """Docstrings and help topics, cleaned. Sources are parsed only: importing some has side effects."""
    for path in library.rglob("*.py"):
        relative = path.relative_to(library)
        if _SKIPPED.intersection(relative.parts):
            continue
        try:
            with warnings.catch_warnings():  # old sources hold invalid escapes
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for node in (tree, *_definitions(tree.body)):
            yield (ast.get_docstring(node) or "").strip()
        if relative.as_posix() == "pydoc_data/topics.py":
            for topics in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
                yield from (inspect.cleandoc(text).strip() for text in ast.literal_eval(topics).values())


def _definitions(body: list[Any]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions at any depth; only statements are walked, which halves the time of `ast.walk`."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        for field in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(nested := getattr(node, field, None), list):
                yield from _definitions(nested)


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1))}
