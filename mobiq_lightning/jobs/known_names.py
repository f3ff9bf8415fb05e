"""What a recipe may name, read from the source code of the classes that it configures.

Nothing is imported for it: torch and Lightning alone take longer to import than a user waits for a typo.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from mobiq_lightning.extras import require

PACKAGE = Path(__file__).parents[1]
STRATEGY_KEYS = {
    "model.transform": "transforms",
    "model.slices": "slices",
    "model.router": "routers",
    "model.budget": "budgets",
    "model.objective": "objectives",
    "model.model_objective": "objectives",
}
"""Keys of a recipe that name a strategy, with the folder of its classes."""


@cache
def words_of(path: Path, name: str) -> tuple[str, ...]:
    """The strings of a ``name = Literal[...]`` in a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return tuple(str(c.value) for c in ast.walk(node.value) if isinstance(c, ast.Constant))
    raise AssertionError(f"{path} defines no {name}")


@cache
def field_annotations_of(path: Path, name: str) -> dict[str, ast.expr]:
    """Fields of a dataclass in a file with their annotations."""
    classes = (n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef))
    body = next(node.body for node in classes if node.name == name)
    return {n.target.id: n.annotation for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


@cache
def fields_of(path: Path, name: str) -> tuple[str, ...]:
    """Fields of a dataclass in a file."""
    return tuple(field_annotations_of(path, name))


@cache
def accepted_keys() -> dict[str, tuple[str, ...]]:
    """Top-level keys, each with the keys below it."""
    require("calibrate", "a recipe")
    return {
        "seed_everything": (),
        "overwrite": (),
        "trainer": _trainer_keys(),
        "model": _classes(PACKAGE / "calibration" / "module.py")["ElasticCalibration"][1],
        "data": _classes(PACKAGE / "sources" / "windows.py")["TextWindows"][1],
    }


def trainer_file() -> Path:
    """The file of Lightning's trainer."""
    spec = importlib.util.find_spec("lightning")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "pytorch" / "trainer" / "trainer.py"


@cache
def annotations_of(path: Path, name: str) -> dict[str, ast.expr]:
    """Arguments of the ``__init__`` of a class in a file that have an annotation; none if the file cannot be read."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError):
        return {}
    found = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == name), None)
    inits = [n for n in (found.body if found else ()) if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    arguments = [a for init in inits for a in (*init.args.args, *init.args.kwonlyargs)]
    return {a.arg: a.annotation for a in arguments if a.annotation is not None}


def _trainer_keys() -> tuple[str, ...]:
    """Arguments of Lightning's trainer; none if its source cannot be read, and its keys are left to the parser.

    Its source is not ours: where its ``__init__`` is moved to another file or base class, a recipe must still run.
    """
    try:
        return _classes(trainer_file())["Trainer"][1]
    except (OSError, SyntaxError, KeyError):
        return ()


@cache
def strategy_classes(kind: str) -> dict[str, tuple[str, ...]]:
    """Classes of ``strategies/<kind>/`` that a recipe may name, with the arguments that a recipe may give them."""
    found: dict[str, tuple[list[str], tuple[str, ...]]] = {}
    for path in sorted((PACKAGE / "strategies" / kind).glob("*.py")):
        found |= _classes(path)
    exported = _exported(PACKAGE / "strategies" / kind / "__init__.py")
    positional = {"in_features", "out_features", "n_slices"}

    def arguments(name: str) -> tuple[str, ...]:
        bases, own = found[name]
        inherited = next((arguments(base) for base in bases if base in found), ())
        return tuple(a for a in (own or inherited) if a not in positional)

    return {name: arguments(name) for name in exported}


@cache
def strategy_annotations(kind: str, name: str) -> dict[str, ast.expr]:
    """Arguments of a class of ``strategies/<kind>/`` with their annotations; those of its base if it has none of its own."""
    for path in sorted((PACKAGE / "strategies" / kind).glob("*.py")):
        if name in (classes := _classes(path)):
            own = annotations_of(path, name)
            bases = [base for base in classes[name][0] if base != name]
            return own or next((found for base in bases if (found := strategy_annotations(kind, base))), {})
    return {}


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
