"""Reads recipes and grids: YAML that says what JSON can hold and nothing else, each key once.

What is wrong is said with its line, before any other parser sees the file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mobiq_lightning.errors import FileError, RecipeError, nearest, shown
from mobiq_lightning.input_files import YAML_BYTES, is_file, parse_yaml, read_text
from mobiq_lightning.jobs.shipped import shipped_recipes
from mobiq_lightning.runs import RUN_CONFIG

_TOP_LEVEL = ("seed_everything", "trainer", "model", "data")
_LONG = 100
"""Characters of a name beyond which it is cut in messages."""
_STRING, _INTEGER = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int"
_MERGE = "tag:yaml.org,2002:merge"
_NOT_PLAIN = {
    "timestamp": "a date; put it into quotes",
    "binary": "bytes; give text",
    "set": "a set; give a list",
    "omap": "an ordered map; give a mapping",
    "pairs": "a list of pairs; give a mapping",
}


def read_recipe(path: str) -> dict[str, Any]:
    """The content of a recipe or grid.

    Args:
        path: Its file; or the content itself, as YAML that begins with a brace.

    Raises:
        RecipeError: If there is no such file, it is not YAML, says what JSON cannot, or is no mapping.
    """
    content = read_recipe_part(path)
    if not isinstance(content, dict):
        raise RecipeError(
            f"{'the recipe' if path.startswith('{') else path} holds no recipe: a mapping of keys such as "
            f"{', '.join(_TOP_LEVEL)} is expected, not {shown(content)}"
        )
    return content


def read_recipe_part(path: str) -> Any:
    """What a file holds that a recipe is made of, or a part of one.

    Args:
        path: Its file; or the content itself, as YAML that begins with a brace.

    Raises:
        RecipeError: If there is no such file, it is not YAML, or says what JSON cannot.
    """
    inline = path.startswith("{")
    if not inline and not is_file(path):
        raise RecipeError(_no_file(path))
    where = "the recipe" if inline else path
    try:
        return parse_yaml(path if inline else read_text(Path(path), YAML_BYTES), where, PlainLoader)
    except FileError as error:
        hint = "; save it as UTF-8" if isinstance(error.__cause__, UnicodeDecodeError) else ""
        raise RecipeError(f"{error}{hint}") from error


def _no_file(path: str) -> str:
    """What is said of a recipe that is not there: the nearest ones beside it, else the nearest shipped ones."""
    name = path if path.isprintable() and 0 < len(path) < _LONG else shown(path)
    try:
        folder = Path(path)
        if path.strip() and folder.is_dir():
            return f"{name} is a folder without {RUN_CONFIG}: neither a recipe nor a run folder"
        beside = [str(p) for p in folder.parent.glob("*.yaml")] if folder.parent.is_dir() else []
    except (OSError, ValueError):  # a name that no file can have
        beside = []
    shipped = shipped_recipes()
    hint = nearest(path[:_LONG], beside) or nearest(
        path[:_LONG].removeprefix("recipes/").removesuffix(".yaml"), shipped
    )
    kind = "no such file" if Path(path[:_LONG]).suffix else "no such file, run folder or shipped recipe"
    return f"{name}: {kind}. {hint or 'Shipped are ' + ', '.join(shipped)}"


def parse_value(text: str, where: str) -> Any:
    """What a value of the command line says; the text itself where it is not YAML, as a name need not be.

    Args:
        text: The value.
        where: The key that it belongs to, for the message.

    Raises:
        RecipeError: If it is a number, or lists and mappings, that cannot be held: too long, too deep, or in themselves.
    """
    try:
        return parse_yaml(text, where, PlainLoader)
    except FileError as error:
        cause, structured = error.__cause__, text.lstrip()[:1] in ("[", "{")
        if isinstance(cause, yaml.YAMLError) and not (structured and isinstance(cause, _NotPlainError)):
            return text
        raise RecipeError(str(error)) from error


class _NotPlainError(yaml.MarkedYAMLError):
    """YAML that is well-formed, but says what a recipe cannot."""


class PlainLoader(yaml.SafeLoader):
    """Makes text, numbers, true, false, null, lists and mappings; keys are text or whole numbers, each once in its mapping.

    YAML itself would keep the last of equal keys in silence, and take dates, sets and bytes, which no results file can hold.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Looks at the keys as they are written, before merge keys bring others."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_STRING, _INTEGER, _MERGE):
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                _refuse(key, f"{shown[:60]!r} is a key that is no name; put it into quotes if it is one")
            if key.value in seen and key.tag != _MERGE:
                _refuse(key, f"{key.value[:60]} is there twice; two things need two names")
            seen.add(key.value)
        return node

    def construct_yaml_float(self, node: Any) -> float:
        """A number; there is no use for one that is not a number."""
        value = float(super().construct_yaml_float(node))
        if math.isnan(value):
            _refuse(node, f"{node.value} is not a number")
        return value

    def construct_yaml_str(self, node: Any) -> str:
        """A text that can be written again; one half of a character that takes two cannot."""
        value = str(super().construct_yaml_str(node))
        if any("\ud800" <= character <= "\udfff" for character in value):
            _refuse(node, "the text holds half of a character")
        return value

    def construct_not_plain(self, node: Any) -> NoReturn:
        """Refuses a type that JSON does not have."""
        shown = f"{node.value[:60]} is " if isinstance(node, yaml.ScalarNode) else "this is "
        _refuse(node, shown + _NOT_PLAIN[node.tag.rpartition(":")[2]])


PlainLoader.add_constructor("tag:yaml.org,2002:float", PlainLoader.construct_yaml_float)
PlainLoader.add_constructor(_STRING, PlainLoader.construct_yaml_str)
for _kind in _NOT_PLAIN:
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", PlainLoader.construct_not_plain)


def _refuse(node: Any, problem: str) -> NoReturn:
    raise _NotPlainError(problem=problem, problem_mark=node.start_mark)
