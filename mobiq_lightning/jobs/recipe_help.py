"""The keys of a recipe with what they mean, read from docstrings without importing a class."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

from mobiq_lightning.jobs.known_names import accepted_keys

_PACKAGE = Path(__file__).parents[1]
_DOCUMENTED = {
    "model": (_PACKAGE / "calibration" / "module.py", "ElasticCalibration"),
    "data": (_PACKAGE / "sources" / "windows.py", "TextWindows"),
}
_INDENT, _WIDTH = 30, 118


def describe_keys(command: str) -> str:
    """All keys of a recipe, each with the line of its docstring, as ``fit --help`` prints them.

    Args:
        command: What the user types, for the example.

    Raises:
        MissingExtraError: If Lightning, which brings the keys of `trainer`, is not installed.
    """
    keys = accepted_keys()
    lines = ["keys of a recipe:", _line("seed_everything", "decides everything random")]
    for group, (path, name) in _DOCUMENTED.items():
        said = documented_arguments(path, name)
        lines += [_line(f"{group}.{key}", said[key]) for key in keys[group]]
    trainer = ", ".join(f"trainer.{key}" for key in keys["trainer"])
    lines += [
        textwrap.fill(f"those of Lightning's Trainer: {trainer}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
    ]
    lines += [f"`{command} --model.router.help MLPRouter` says what a strategy takes."]
    return "\n".join(lines) + "\n"


def documented_arguments(path: Path, name: str) -> Mapping[str, str]:
    """What the docstring of a class says of each argument, on one line each.

    Args:
        path: The file of the class.
        name: The class.
    """
    body = ast.parse(path.read_text(encoding="utf-8")).body
    node = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == name)
    section = inspect.cleandoc(ast.get_docstring(node) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^    (?=\w+: )", section, flags=re.MULTILINE)[1:]
    parts = (entry.partition(": ") for entry in entries)
    return {key: " ".join(text.split()) for key, _, text in parts}


def _line(key: str, said: str) -> str:
    return textwrap.fill(
        f"  {key:{_INDENT - 3}} {said}", _WIDTH, subsequent_indent=" " * _INDENT, break_on_hyphens=False
    )
