"""Values of a recipe that are not of the type of their key, told from the annotations of the classes that take them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

from mobiq_lightning.errors import nearest, shown
from mobiq_lightning.jobs.known_names import (
    PACKAGE,
    annotations_of,
    field_annotations_of,
    strategy_annotations,
    trainer_file,
    words_of,
)

_ALIASES = {"Storage": "calibration/hidden_states.py", "Share": "nn/layout.py", "Protocol": "sources/text.py"}
"""Names of a set of words in the annotations, by the file that defines them."""
_SIMPLE = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}


class _Accepted:
    """What an annotation accepts.

    Args:
        names: Simple types by their names, ``list`` among them.
        words: Words of which the value must be one, if it is no other of the types.
    """

    def __init__(self, names: frozenset[str] = frozenset(), words: tuple[str, ...] = ()) -> None:
        self.names, self.words = names, words

    def __or__(self, other: _Accepted) -> _Accepted:
        return _Accepted(self.names | other.names, (*self.words, *other.words))

    def takes(self, value: Any) -> bool:
        """Whether a value, or what a text of the command line would become, is accepted."""
        if value is None or "str" in self.names:  # whatever the command line says can be a text
            return True
        if isinstance(value, bool):
            return "bool" in self.names
        if isinstance(value, (int, float)):
            whole = isinstance(value, int) or value.is_integer()
            return "float" in self.names or ("int" in self.names and whole)
        if isinstance(value, str):
            return value in self.words or (bool({"int", "float"} & self.names) and _number(value))
        return ("list" if isinstance(value, list) else "dict") in self.names

    def __str__(self) -> str:
        kinds = [text for name, text in _SIMPLE.items() if name in self.names] + ["a list"] * ("list" in self.names)
        kinds += ["a mapping"] * ("dict" in self.names)
        if self.words:
            kinds.append(f"one of {', '.join(self.words)}")
        return " or ".join(kinds)


def type_problems(key: str, value: Any) -> list[str]:
    """A line if a value is not of the type of its key; nothing is said where the type is no simple one.

    Args:
        key: Dotted key.
        value: What the recipe says.
    """
    return _problems(key, _types().get(key), value)


def _problems(key: str, accepted: _Accepted | None, value: Any) -> list[str]:
    if accepted is None or accepted.takes(value):
        return []
    hint = nearest(value, accepted.words) if isinstance(value, str) else ""
    return [f"{key}: {shown(value)}; {accepted} is expected. {hint}".rstrip()]


def argument_problems(key: str, kind: str, name: str, argument: str, value: Any) -> list[str]:
    """A line if a value is not of the type of an argument of a shipped strategy.

    Args:
        key: Dotted key of the argument.
        kind: Folder of the strategy, such as ``routers``.
        name: Class of the strategy.
        argument: The argument.
        value: What the recipe says.
    """
    annotation = strategy_annotations(kind, name).get(argument)
    return [] if annotation is None else _problems(key, _accepted(annotation), value)


def stage_value_problems(where: str, field: str, value: Any) -> list[str]:
    """A line if a value is not of the type of a field of a stage.

    Args:
        where: The stage, for the message.
        field: The field.
        value: What the recipe says.
    """
    annotation = field_annotations_of(PACKAGE / "calibration" / "schedule.py", "Stage").get(field)
    return [] if annotation is None else _problems(f"{where}.{field}", _accepted(annotation), value)


@cache
def _types() -> dict[str, _Accepted]:
    found = {}
    files = {
        "model": (PACKAGE / "calibration" / "module.py", "ElasticCalibration"),
        "data": (PACKAGE / "sources" / "windows.py", "TextWindows"),
        "trainer": (trainer_file(), "Trainer"),
    }
    for group, (path, name) in files.items():
        for argument, annotation in annotations_of(path, name).items():
            accepted = _accepted(annotation)
            if accepted is not None:
                found[f"{group}.{argument}"] = accepted
    return found


def _accepted(annotation: ast.expr) -> _Accepted | None:
    """What an annotation accepts; None if part of it is no simple type, or a text stands for many things."""
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return _Accepted()
    if isinstance(annotation, ast.Name):
        if annotation.id in _ALIASES:
            return _Accepted(words=words_of(Path(PACKAGE / _ALIASES[annotation.id]), annotation.id))
        return _Accepted(frozenset({annotation.id})) if annotation.id in _SIMPLE else None
    if isinstance(annotation, ast.BinOp):
        return _joined([annotation.left, annotation.right])
    if isinstance(annotation, ast.Subscript):
        kind = ast.unparse(annotation.value)
        parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if kind == "Literal":
            return _Accepted(words=tuple(str(part.value) for part in parts if isinstance(part, ast.Constant)))
        if kind in ("list", "List", "dict", "Dict", "Sequence"):
            return _Accepted(frozenset({"dict" if kind in ("dict", "Dict") else "list"}))
        if kind == "Optional":
            return _accepted(parts[0])
        if kind == "Union":
            return _joined(parts)
    return None


def _joined(parts: list[ast.expr]) -> _Accepted | None:
    found = _Accepted()
    for part in parts:
        accepted = _accepted(part)
        if accepted is None:
            return None
        found |= accepted
    return found


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
