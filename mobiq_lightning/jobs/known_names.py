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


@cache
def words_of(path: Path, name: str) -> tuple[str, ...]:
    """The strings of a ``name = Literal[...]`` in a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return tuple(str(c.value) for c in ast.walk(node.value) if isinstance(c, ast.Constant))
    raise AssertionError(f"{path} defines no {name}")


@cache
def fields_of(path: Path, name: str) -> tuple[str, ...]:
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
        "model": _classes(PACKAGE / "calibration" / "module.py")["ElasticCalibration"][1],
        "data": _classes(PACKAGE / "sources" / "windows.py")["TextWindows"][1],
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
    for path in sorted((PACKAGE / "strategies" / kind).glob("*.py")):
        found |= _classes(path)
    exported = _exported(PACKAGE / "strategies" / kind / "__init__.py")
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
