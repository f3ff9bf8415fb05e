"""Checks a recipe in a fraction of a second, before anything heavy is imported.

What keys exist is read from the source code of the classes that a recipe configures, without importing them: torch and
Lightning alone take longer to import than a user waits for a typo. Values and types are checked by the real parser.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mobiq_lightning.errors import RecipeError, nearest
from mobiq_lightning.extras import require
from mobiq_lightning.jobs.shipped import shipped_recipes

_PACKAGE = Path(__file__).parents[1]
_STRATEGY_KEYS = {
    "model.transform": "transforms",
    "model.slices": "slices",
    "model.router": "routers",
    "model.budget": "budgets",
    "model.objective": "objectives",
    "model.model_objective": "objectives",
}
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
_TOP_LEVEL = ("seed_everything", "trainer", "model", "data", "overwrite")


def check_arguments(arguments: Sequence[str]) -> None:
    """Checks the recipes and the keys of a ``fit`` or ``validate`` command line.

    Args:
        arguments: What follows the command.

    Raises:
        MissingExtraError: If calibrating is not installed.
        RecipeError: With one line for every key or class that does not exist.
    """
    problems: list[str] = []
    classes: dict[str, str] = {}  # of the strategies, as far as the command line has named them
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("-") or argument in ("-h", "--help"):
            continue
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            path = value if equals else (pending.pop(0) if pending else "")
            recipe = read_recipe(path)
            where = "the recipe" if path.startswith("{") else path
            problems += [f"{where}: {problem}" for problem in check_recipe(recipe)]
            classes |= {key: _class_name(value) for key, value in _strategies(recipe)}
        elif name.startswith("--") and not name.startswith("--print_") and not name.endswith(".help"):
            keys = name[2:].rstrip("+").split(".")
            given = value if equals else (pending[0] if pending else "")
            problems += check_key(keys) or _check_override(keys, given, classes)
    if problems:
        raise RecipeError("\n".join(problems))


def read_recipe(path: str) -> dict[str, Any]:
    """The content of a recipe.

    Args:
        path: Its file; or the content itself, as YAML that begins with a brace.

    Raises:
        RecipeError: If there is no such file, or it is not YAML.
    """
    if not path.startswith("{") and not Path(path).is_file():
        raise RecipeError(f"--config {path}: no such file. {_nearest_recipe(path)}".rstrip())
    try:
        content = yaml.safe_load(path if path.startswith("{") else Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds no recipe: a mapping with the keys {', '.join(_TOP_LEVEL[:4])} is expected")
    return content


def _nearest_recipe(path: str) -> str:
    """The closest recipes beside `path`, else the closest shipped ones, which go by their names."""
    folder = Path(path).parent
    beside = nearest(path, [str(p) for p in folder.glob("*.yaml")]) if folder.is_dir() else ""
    return beside or nearest(path.removeprefix("recipes/").removesuffix(".yaml"), shipped_recipes())


def check_recipe(recipe: dict[str, Any]) -> list[str]:
    """One line for every key or class name of a recipe that does not exist."""
    return [
        problem
        for keys, value in _walk(recipe, [])
        for problem in (
            check_key(keys) or _check_group(keys, value) or _check_class(keys, value) or _check_stages(keys, value)
        )
    ]


def _strategies(recipe: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys of the strategies that a recipe names, with what it says of them."""
    for key in _STRATEGY_KEYS:
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
    if len(keys) == 1 or keys == ["model", "stages"] or (key in GROUPS and len(keys) == 2):
        try:
            given = yaml.safe_load(value)
        except yaml.YAMLError:
            return []  # the parser will say what it makes of it
        if len(keys) == 1:
            return check_recipe({key: given}) if isinstance(given, dict) else []
        return _check_stages(keys, given) or _check_group(keys, given)
    if key not in _STRATEGY_KEYS:
        return []
    if len(keys) == 2 or keys[2] == "class_path":
        try:
            spec = yaml.safe_load(value)
        except yaml.YAMLError:
            return []  # the parser will say what it makes of it
        classes[key] = _class_name(spec)
        return _check_class(keys[:2], spec)
    argument = keys[3] if keys[2] == "init_args" and len(keys) > 3 else keys[2]
    if argument in ("init_args", "dict_kwargs"):
        return []
    return _check_class(keys[:2], {"class_path": classes.get(key), "init_args": {argument: value}})


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
    known = _fields(_PACKAGE / path, name)
    return [
        f"{group}.{key}: no such key. {nearest(str(key), known) or 'There are ' + ', '.join(known)}"
        for key in value
        if key not in known
    ]


def _check_class(keys: list[str], value: Any) -> list[str]:
    """A problem if a strategy's class, or an argument of it, does not exist."""
    key = ".".join(keys)
    if key not in _STRATEGY_KEYS or value is None:
        return []
    spec = value if isinstance(value, dict) else {"class_path": value}
    path = spec.get("class_path")
    if path is None or not isinstance(path, str) or path.endswith((".yaml", ".yml")):
        return []
    known = strategy_classes(_STRATEGY_KEYS[key])
    name = path.rsplit(".", 1)[-1] if path.startswith("mobiq_lightning.") else path
    if name not in known:
        # A dotted path is somebody's own class, and only importing it tells what it accepts.
        return (
            []
            if "." in name
            else [f"{key}: no class {path!r}. {nearest(name, known) or 'There are ' + ', '.join(known)}"]
        )
    unknown_parts = [part for part in spec if part not in ("class_path", "init_args", "dict_kwargs")]
    problems = [f"{key}.{part}: arguments of {name} go under init_args" for part in unknown_parts]
    arguments = spec.get("init_args") or {}
    if not isinstance(arguments, dict):
        return [*problems, f"{key}.init_args: {arguments!r} is no mapping of arguments to values"]
    for argument in arguments:
        if argument not in known[name]:
            hint = nearest(argument, known[name]) or f"It has {', '.join(known[name]) or 'none'}."
            problems.append(f"{key}.init_args.{argument}: {name} has no such argument. {hint}")
    return problems


def _check_stages(keys: list[str], value: Any) -> list[str]:
    """One line for every key of a stage, and every word of what it trains, that does not exist."""
    if keys != ["model", "stages"] or not isinstance(value, list):
        return []
    schedule = _PACKAGE / "calibration" / "schedule.py"
    known = _fields(schedule, "Stage")
    words = {
        "train": _words(_PACKAGE / "nn" / "calibrated_block.py", "Learned"),
        "bounds": _words(schedule, "Bound"),
    }
    problems = []
    for number, stage in enumerate(value):
        for key, given in stage.items() if isinstance(stage, dict) else ():
            where = f"model.stages[{number}].{key}"
            if key not in known:
                problems.append(f"{where}: no such key. {nearest(str(key), known) or 'There are ' + ', '.join(known)}")
            wanted = [given] if isinstance(given, str) else given
            for word in wanted if key in words and isinstance(wanted, list) else ():
                if key == "train" and str(word) in _RENAMED_TRAINED:
                    problems.append(f"{where}: {word}: renamed to {_RENAMED_TRAINED[str(word)]}")
                elif word not in words[key]:
                    hint = nearest(str(word), words[key]) or "There are " + ", ".join(words[key])
                    problems.append(f"{where}: no such word {word!r}. {hint}")
    return problems


@cache
def _words(path: Path, name: str) -> tuple[str, ...]:
    """The strings of a ``name = Literal[...]`` in a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return tuple(str(c.value) for c in ast.walk(node.value) if isinstance(c, ast.Constant))
    raise AssertionError(f"{path} defines no {name}")


@cache
def _fields(path: Path, name: str) -> tuple[str, ...]:
    """Fields of a dataclass in a file."""
    classes = (n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef))
    body = next(node.body for node in classes if node.name == name)
    return tuple(n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))


@cache
def accepted_keys() -> dict[str, tuple[str, ...]]:
    """Top-level keys, each with the keys below it."""
    require("calibrate", "a recipe")
    return {
        "seed_everything": (),
        "overwrite": (),
        "trainer": _trainer_keys(),
        "model": _classes(_PACKAGE / "calibration" / "module.py")["ElasticCalibration"][1],
        "data": _classes(_PACKAGE / "sources" / "windows.py")["TextWindows"][1],
    }


def _trainer_keys() -> tuple[str, ...]:
    """Arguments of Lightning's trainer; none if its source cannot be read, and its keys are left to the parser.

    Its source is not ours: where its ``__init__`` is moved to another file or base class, a recipe must still run.
    """
    spec = importlib.util.find_spec("lightning")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(next(iter(spec.submodule_search_locations))) / "pytorch" / "trainer" / "trainer.py"
    try:
        return _classes(path)["Trainer"][1]
    except (OSError, SyntaxError, KeyError):
        return ()


@cache
def strategy_classes(kind: str) -> dict[str, tuple[str, ...]]:
    """Classes of ``strategies/<kind>/`` that a recipe may name, with the arguments that a recipe may give them."""
    found: dict[str, tuple[list[str], tuple[str, ...]]] = {}
    for path in sorted((_PACKAGE / "strategies" / kind).glob("*.py")):
        found |= _classes(path)
    exported = _exported(_PACKAGE / "strategies" / kind / "__init__.py")
    positional = {"in_features", "out_features", "n_slices"}

    def arguments(name: str) -> tuple[str, ...]:
        bases, own = found[name]
        inherited = next((arguments(base) for base in bases if base in found), ())
        return tuple(a for a in (own or inherited) if a not in positional)

    return {name: arguments(name) for name in exported}


def _classes(path: Path) -> dict[str, tuple[list[str], tuple[str, ...]]]:
    """Classes of a file: names of their bases, and arguments of their ``__init__`` (none if they have none)."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        names = (
            () if init is None else tuple(a.arg for a in [*init.args.args, *init.args.kwonlyargs] if a.arg != "self")
        )
        found[node.name] = ([base.id for base in node.bases if isinstance(base, ast.Name)], names)
    return found


def _exported(path: Path) -> list[str]:
    """Names in the ``__all__`` of a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return list(ast.literal_eval(node.value))
    return []
