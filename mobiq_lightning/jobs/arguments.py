"""What a job is given, as a command line: the recipe by path, name or content, and keys that override it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from mobiq_lightning.errors import RecipeError, shown
from mobiq_lightning.input_files import is_file
from mobiq_lightning.jobs.shipped import recipe_path
from mobiq_lightning.runs import RunFolder

Recipe: TypeAlias = str | Path | RunFolder | Mapping[str, Any]
"""A recipe: its path, the name of a shipped one such as `tiny`, the folder of a run that was made from one, or its content."""
_CONFIG = ("--config", "-c")


def command_line(recipe: Recipe, overrides: Mapping[str, Any]) -> list[str]:
    """The command line that says the same as a call of a job.

    Args:
        recipe: The recipe.
        overrides: Keys of the recipe with other values, dotted (``{"model.rates.routers": 0.1}``) or nested
            (``{"model": {"rates": {"routers": 0.1}}}``).

    Raises:
        RecipeError: If the recipe is none of these, or a value is nothing that YAML can say.
    """
    if isinstance(recipe, Mapping):
        arguments = ["--config", _text("recipe", recipe)]
    elif isinstance(recipe, (str, Path, RunFolder)):
        arguments = with_recipe([f"--config={recipe.path if isinstance(recipe, RunFolder) else recipe}"])
    else:
        raise RecipeError(
            f"a recipe is a path, the name of a shipped one, a run folder or a mapping, not {shown(recipe)}"
        )
    return [*arguments, *override_arguments(overrides)]


def override_arguments(overrides: Mapping[str, Any]) -> list[str]:
    """``--key=value`` for every key of a recipe that gets another value, dotted or nested.

    Raises:
        RecipeError: If a value is nothing that YAML can say.
    """
    flat = list(_flatten(overrides))
    if unknown := [key for key, _ in flat if key in ("config", "c")]:
        raise RecipeError(f"{unknown[0]}: no such key of a recipe; the recipe itself is the first argument")
    return [f"--{key}={_text(key, value)}" for key, value in flat]


def overwrite_arguments(overwrite: object) -> list[str]:
    """What ``overwrite=True`` of a function is on the command line.

    Raises:
        RecipeError: If it is neither True nor False: a text such as "no" would count as true.
    """
    if not isinstance(overwrite, bool):
        raise RecipeError(f"overwrite ({shown(overwrite)}) must be True or False")
    return ["--overwrite"] if overwrite else []


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """A command line with the recipe as ``--config PATH``, however it was given: first, by name, or as a run folder.

    A run folder is where it is now: neither a run that was moved nor another working directory changes that, though its recipe
    may name a path that leads elsewhere. The same holds for the recipe in a run folder.
    """
    given = list(arguments)
    if given and not given[0].startswith("-"):
        given.insert(0, "--config")
    found: list[str] = []
    while given:
        name, equals, value = given.pop(0).partition("=")
        if name not in _CONFIG or not (equals or given):
            found.append(name + equals + value)
            continue
        path = value if equals else given.pop(0)
        if path.startswith("{"):  # the content itself
            found += ["--config", path]
        elif path and is_file(recipe := RunFolder(path).recipe):  # the run may have been moved since
            found += ["--config", str(recipe), f"--trainer.default_root_dir={path}"]
        else:
            around = RunFolder.around(Path(path)) if is_file(path) else None
            found += ["--config", recipe_path(path)]
            found += [] if around is None else [f"--trainer.default_root_dir={around.path}"]
    return found


def _flatten(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Overrides by dotted key; a mapping that names a class is a value, which replaces the class with its arguments."""
    for key, value in overrides.items():
        if isinstance(value, Mapping) and "class_path" not in value and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(key: str, value: Any) -> str:
    """A value as the command line writes it: text as it is, all else as YAML on one line."""
    if isinstance(value, (str, Path)):
        return str(value)
    try:
        text = yaml.safe_dump(_plain(value), default_flow_style=True, width=math.inf, sort_keys=False)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a class; a number too long; a list in itself
        raise RecipeError(
            f"{key}: {shown(value)} is nothing that a recipe can say; give numbers, text, lists and mappings"
        ) from error
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    """Mappings as dicts, sequences as lists, paths as text: what YAML has words for."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
