"""The keys of a grid: what each of them takes, in one table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mobiq_lightning.errors import nearest, shown

NAME_LENGTH = 100
"""Most characters of a name: file systems take some 255, and names have more put after them."""
MAX_SEED, MAX_WORKERS, MAX_CELLS = 2**32 - 1, 1024, 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


@dataclass(frozen=True)
class Key:
    """What a key of a grid takes.

    Args:
        expected: The values that it takes, in words.
        takes: Whether a value is one of them.
        needed: Whether a grid must have the key.
        nothing: What is said where the value is an empty list or mapping, in place of what was expected.
    """

    expected: str
    takes: Callable[[Any], bool]
    needed: bool = False
    nothing: str = ""


def can_name_a_folder(value: Any) -> bool:
    """Whether a value is a text that can name a folder on any system."""
    return isinstance(value, str) and len(value) <= NAME_LENGTH and _NAME.fullmatch(value) is not None


def _text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _bits(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 16 and math.isfinite(value)


def _optional_mapping(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(key, str) for key in value))


KEYS: Mapping[str, Key] = {
    "name": Key("a text that can name a folder", lambda v: isinstance(v, str) and v != "", needed=True),
    "recipe": Key(
        "the path of a recipe, or the name of a shipped one",
        lambda v: _text(v) and v != "" and not v.startswith("{"),
        needed=True,
    ),
    "strategies": Key(
        "a mapping of names to the keys of the recipe that each changes",
        lambda v: isinstance(v, dict) and 0 < len(v) <= MAX_CELLS,
        needed=True,
        nothing="none is given; name at least one, with the keys of the recipe that it changes",
    ),
    "seeds": Key(
        f"a list of whole numbers is expected, from 0 to {MAX_SEED}, as in [0, 1, 2]",
        lambda v: isinstance(v, list) and 0 < len(v) <= MAX_CELLS and all(_whole(seed, 0, MAX_SEED) for seed in v),
        needed=True,
        nothing="none is given; a comparison without seeds has no spread. Give at least three, as in [0, 1, 2]",
    ),
    "bits": Key(
        "a list of numbers is expected, above 0 and at most 16, as in [2, 2.5, 3]",
        lambda v: isinstance(v, list) and 0 < len(v) <= MAX_CELLS and all(map(_bits, v)),
        needed=True,
    ),
    "folder": Key("the path of a folder", _text),
    "title": Key("a text", _text),
    "changes": Key("a mapping of keys of the recipe to values", _optional_mapping),
    "workers": Key(
        f"a number of at least 1 and at most {MAX_WORKERS}, or auto",
        lambda v: v == "auto" or _whole(v, 1, MAX_WORKERS),
    ),
    "wandb": Key("a mapping of arguments of WandbLogger to values, or null", _optional_mapping),
}
"""The keys that a grid has, in the order in which they are looked at."""


def schema_problems(content: Mapping[Any, Any]) -> Iterator[str]:
    """A line for each key of a grid that is unknown, missing, or holds something else than it takes.

    Args:
        content: What the YAML of the grid says.
    """
    for key in content:
        if key not in KEYS:
            yield f"{shown(key) if not isinstance(key, str) else key}: no such key. {nearest(str(key), KEYS)}".rstrip()
    for name, key in KEYS.items():
        if name not in content:
            if key.needed:
                yield f"{name}: missing; {_expected(key)}"
        elif not key.takes(content[name]):
            empty = content[name] in ([], {}, None) and key.nothing
            yield f"{name}: {key.nothing}" if empty else f"{name}: {shown(content[name])}; {_expected(key)}"


def name_problems(content: Mapping[str, Any]) -> Iterator[str]:
    """A line for each name of a grid that can name no folder, and for each that is given twice.

    Args:
        content: A grid that the schema takes.
    """
    strategies, seeds = content["strategies"], content["seeds"]
    if len(strategies) * len(seeds) > MAX_CELLS:
        yield f"seeds: {len(strategies)} strategies x {len(seeds)} seeds are more cells than the {MAX_CELLS} that are run"
    if len(set(seeds)) < len(seeds):
        yield f"seeds: {shown(seeds)} holds one twice; the same seed gives the same run"
    lower: dict[str, Any] = {}
    for place, name in [("name", content["name"]), *(("strategies", name) for name in strategies)]:
        if not can_name_a_folder(name):
            yield (
                f"{place}: {shown(name)} cannot name a folder; use letters, digits and . _ + = -, at most {NAME_LENGTH}, "
                "and put numbers into quotes"
            )
        elif place == "strategies":
            if name.lower() in lower:
                first = lower[name.lower()]
                yield f"strategies: {first!r} and {name!r} would share a folder where case does not count"
            lower[name.lower()] = name
    for name, changes in strategies.items():
        if not _optional_mapping(changes):
            yield f"strategies.{name}: {shown(changes)}; a mapping of keys of the recipe to values is expected"


def _expected(key: Key) -> str:
    return key.expected if " expected" in key.expected else f"{key.expected} is expected"
