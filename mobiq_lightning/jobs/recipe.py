"""Checks a recipe in a fraction of a second, before anything heavy is imported.

What keys exist is read from the source code of the classes that a recipe configures, without importing them: torch and
Lightning alone take longer to import than a user waits for a typo. Values and types are checked by the real parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mobiq_lightning.errors import RecipeError, nearest, shown
from mobiq_lightning.input_files import is_file
from mobiq_lightning.jobs.asked import asked_values
from mobiq_lightning.jobs.asked_checks import asked_problems
from mobiq_lightning.jobs.known_names import (
    PACKAGE,
    STRATEGY_KEYS,
    accepted_keys,
    fields_of,
    strategy_classes,
    words_of,
)
from mobiq_lightning.jobs.reading import parse_value, read_recipe, read_recipe_part
from mobiq_lightning.jobs.value_ranges import range_problems
from mobiq_lightning.jobs.value_types import stage_value_problems

GROUPS = {"model.rates": ("calibration/rates.py", "Rates"), "model.layout": ("nn/layout.py", "BlockLayout")}
"""Keys that hold further keys: the fields of a dataclass, by the file in which it is."""
_RENAMED = {
    "model.slices_lr": "model.rates.ranges",
    "model.weights_lr": "model.rates.codes",
    "model.transform_lr": "model.rates.transforms",
    "model.router_lr": "model.rates.routers",
}
_RENAMED_TRAINED = {
    "slices": "ranges, transforms",
    "weights": "codes",
    "clipping": "ranges, with bounds: [clipping]",
    "rounding": "codes, with bounds: [rounding]",
}
"""Former words of `train` in a stage, with what is written instead."""


def check_arguments(arguments: Sequence[str], files: Sequence[str] = ()) -> None:
    """Checks the recipes, the keys and the values of a ``fit`` or ``validate`` command line.

    Args:
        arguments: What follows the command.
        files: Keys of the model and of text that must name what is there, as the command reads it.

    Raises:
        MissingExtraError: If calibrating is not installed.
        RecipeError: With one line for every key or class that does not exist, and every value that cannot be held.
    """
    if not arguments:
        raise RecipeError("no recipe is given. Give a recipe, as in --config recipes/tiny.yaml")
    problems: list[str] = []
    classes: dict[str, str] = {}  # of the strategies, as far as the command line has named them
    pending = list(arguments)
    while pending:
        name, equals, value = pending.pop(0).partition("=")
        if name in ("-h", "--help", "--overwrite") or name.startswith("--print_"):
            continue
        if not name.startswith("-") or not (name.startswith("--") or name == "-c"):
            problems.append(
                f"{shown(name + equals + value)}: one recipe is taken, and keys of it, as in --data.n_samples 64"
            )
            continue
        if not equals:
            if not pending or _is_option(pending[0]):
                unknown = [] if name in ("--config", "-c") else check_key(_keys_of(name))
                problems += [] if name.endswith(".help") else unknown or [f"{name}: a value is missing"]
                continue
            value = pending.pop(0)
        if name in ("--config", "-c"):
            recipe = read_recipe(value)
            where = "the recipe" if value.startswith("{") else value
            problems += [f"{where}: {problem}" for problem in check_recipe(recipe)]
            classes |= {key: _class_name(value) for key, value in _strategies(recipe)}
        elif not name.endswith(".help"):
            keys = _keys_of(name)
            problems += check_key(keys) or _check_override(keys, value, classes)
    for problem in asked_problems(asked_values(arguments), files):
        key = problem.partition(": ")[0]
        if not any(f"{key}: " in said for said in problems):  # a value is wrong in one way at a time
            problems.append(problem)
    if problems:
        raise RecipeError("\n".join(problems))


def _keys_of(option: str) -> list[str]:
    """``[model, eval_bits]`` of ``--model.eval_bits``; a plus behind it adds to a list."""
    return option[2:].rstrip("+").split(".")


def _is_option(text: str) -> bool:
    """Whether the parser takes a text for the name of an option and not for a value."""
    return text.startswith("-") and " " not in text and not re.fullmatch(r"-|-\.?\d.*", text)


def check_recipe(recipe: dict[str, Any]) -> list[str]:
    """One line for every key or class name of a recipe that does not exist."""
    return [
        problem
        for keys, value in _walk(recipe, [])
        for problem in (
            check_key(keys)
            or _check_group(keys, value)
            or _check_class(keys, value)
            or _check_stages(keys, value)
            or _check_value(keys, value)
        )
    ]


def _strategies(recipe: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys of the strategies that a recipe names, with what it says of them."""
    for key in STRATEGY_KEYS:
        model = recipe.get("model")
        value = model.get(key.partition(".")[2]) if isinstance(model, dict) else None
        if value is not None:
            yield key, value


def _class_name(value: Any) -> str:
    path = value.get("class_path") if isinstance(value, dict) else value
    return str(path or "").removeprefix("mobiq_lightning.strategies.")


def _check_override(keys: list[str], value: str, classes: dict[str, str]) -> list[str]:
    """A problem if ``--model.router.init_args.x value`` names no argument of the class that the router has by now."""
    key = ".".join(keys[:2])
    given = parse_value(value, f"--{'.'.join(keys)}")
    if len(keys) == 1 and isinstance(given, dict):
        return check_recipe({keys[0]: given})
    if len(keys) == 1 or key not in STRATEGY_KEYS:
        return _check_stages(keys, given) or _check_group(keys, given) or _check_value(keys, given)
    if len(keys) == 2 or keys[2] == "class_path":
        classes[key] = _class_name(given)
        return _check_class(keys[:2], given) or _check_value(keys[:2], given)
    argument = keys[3] if keys[2] == "init_args" and len(keys) > 3 else keys[2]
    if argument in ("init_args", "dict_kwargs"):
        return []
    return _check_class(keys[:2], {"class_path": classes.get(key), "init_args": {argument: value}})


def _check_value(keys: list[str], value: Any) -> list[str]:
    """A problem if a value cannot be one of its key, as far as that can be told here."""
    key = ".".join(keys)
    if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")) and is_file(value):
        read_recipe_part(value)  # the parser would read it as the value
        return []
    if key in ("model", "data", "trainer", *GROUPS) and value is not None and not isinstance(value, dict):
        return [f"{key}: {shown(value)}; a mapping of keys to values is expected"]
    return range_problems(key, value)


def _walk(value: Any, keys: list[str]) -> Iterator[tuple[list[str], Any]]:
    """Keys with their values; of a strategy, its class and the names of its arguments."""
    if keys:
        yield keys, value
    if isinstance(value, dict) and len(keys) < 2 and (not keys or not check_key(keys)):
        for key, inner in value.items():
            yield from _walk(inner, [*keys, str(key)])


def check_key(keys: list[str]) -> list[str]:
    """A problem if the path ``[model, slices, ...]`` names no key, or one that has another name now.

    Below the second level, keys of groups are known here; those of classes are looked at with the class.
    """
    accepted = accepted_keys()
    above = ".".join(keys[:2])
    if above in _RENAMED:
        return [f"{above}: renamed to {_RENAMED[above]}"]
    if keys[0] not in accepted:
        known = [*accepted, *(f"{top}.{key}" for top, inner in accepted.items() for key in inner)]
        return [f"{'.'.join(keys)}: no such key. {nearest('.'.join(keys), known)}".rstrip()]
    if len(keys) > 1 and accepted[keys[0]] and keys[1] not in accepted[keys[0]]:
        hint = nearest(".".join(keys[:2]), [f"{keys[0]}.{key}" for key in accepted[keys[0]]])
        everywhere = [f"{top}.{key}" for top, inner in accepted.items() for key in inner if key == keys[1]]
        hint = f"Did you mean {everywhere[0]!r}?" if everywhere else hint
        return [f"{'.'.join(keys[:2])}: no such key. {hint}".rstrip()]
    return _check_group(keys[:2], {keys[2]: None}) if len(keys) > 2 else []


def _check_group(keys: list[str], value: Any) -> list[str]:
    """One line for every key of a group that does not exist."""
    group = ".".join(keys)
    if group not in GROUPS or not isinstance(value, dict):
        return []
    path, name = GROUPS[group]
    known = fields_of(PACKAGE / path, name)
    return [
        f"{group}.{key}: no such key. {nearest(str(key), known) or 'There are ' + ', '.join(known)}"
        for key in value
        if key not in known
    ]


def _check_class(keys: list[str], value: Any) -> list[str]:
    """A problem if a strategy's class, or an argument of it, does not exist."""
    key = ".".join(keys)
    if key not in STRATEGY_KEYS or value is None:
        return []
    spec = value if isinstance(value, dict) else {"class_path": value}
    path = spec.get("class_path")
    if path is not None and not isinstance(path, str):
        return [f"{key}: {shown(path)} names no class; give its name, or its dotted path"]
    if path is None or path.endswith((".yaml", ".yml")):
        return []
    known = strategy_classes(STRATEGY_KEYS[key])
    name = path.rsplit(".", 1)[-1] if path.startswith("mobiq_lightning.") else path
    if name not in known:
        # A dotted path is somebody's own class, and only importing it tells what it accepts.
        return (
            []
            if "." in name
            else [f"{key}: no class {shown(path)}. {nearest(name, known) or 'There are ' + ', '.join(known)}"]
        )
    unknown_parts = [part for part in spec if part not in ("class_path", "init_args", "dict_kwargs")]
    problems = [f"{key}.{part}: arguments of {name} go under init_args" for part in unknown_parts]
    arguments = spec.get("init_args") or {}
    if not isinstance(arguments, dict):
        return [*problems, f"{key}.init_args: {shown(arguments)} is no mapping of arguments to values"]
    for argument in arguments:
        if argument not in known[name]:
            hint = nearest(argument, known[name]) or f"It has {', '.join(known[name]) or 'none'}."
            problems.append(f"{key}.init_args.{argument}: {name} has no such argument. {hint}")
    return problems


def _check_stages(keys: list[str], value: Any) -> list[str]:
    """One line for every key of a stage, and every word of what it trains, that does not exist."""
    if keys != ["model", "stages"] or not isinstance(value, list):
        return []
    schedule = PACKAGE / "calibration" / "schedule.py"
    known = fields_of(schedule, "Stage")
    words = {
        "train": words_of(PACKAGE / "nn" / "calibrated_block.py", "Learned"),
        "bounds": words_of(schedule, "Bound"),
    }
    problems: list[str] = []
    for number, stage in enumerate(value):
        found: list[str] = []
        for key, given in stage.items() if isinstance(stage, dict) else ():
            where = f"model.stages[{number}].{key}"
            if key not in known:
                found.append(f"{where}: no such key. {nearest(str(key), known) or 'There are ' + ', '.join(known)}")
            found += stage_value_problems(f"model.stages[{number}]", key, given) if key in known else []
            wanted = [given] if isinstance(given, str) else given
            for word in wanted if key in words and isinstance(wanted, list) else ():
                if key == "train" and str(word) in _RENAMED_TRAINED:
                    found.append(f"{where}: {word}: renamed to {_RENAMED_TRAINED[str(word)]}")
                elif word not in words[key]:
                    hint = nearest(str(word), words[key]) or "There are " + ", ".join(words[key])
                    found.append(f"{where}: no such word {word!r}. {hint}")
        if isinstance(stage, dict) and "train" not in stage and not found:
            found.append(f"model.stages[{number}]: train is missing; give some of {', '.join(words['train'])}")
        problems += found
    return problems
