"""The recipes and grids that come with the package: where they are, and what may be said instead of a path."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mobiq_lightning.errors import RecipeError, nearest
from mobiq_lightning.input_files import is_file

_PACKAGE = Path(__file__).parents[1]
GRIDS = "compare"
"""Folder of the grids among the recipes."""


@cache
def shipped_recipes() -> dict[str, Path]:
    """Files of all shipped recipes by name: `tiny`, `compare/budgets`.

    Raises:
        RecipeError: If the installation holds none.
    """
    # A wheel has them within the package, a checkout beside it.
    folder = next((f for f in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if (f / "tiny.yaml").is_file()), None)
    if folder is None:
        raise RecipeError(f"no recipes come with the installation in {_PACKAGE}: install mobiq-lightning again")
    files = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def shipped_recipe(name: str, folder: str = "") -> Path:
    """The file of a shipped recipe.

    Args:
        name: As in `shipped_recipes`; what follows the last ``/`` is enough where no other recipe ends so. ``.yaml`` and
            ``recipes/`` may be left out.
        folder: Folder that is looked into first, as in ``compare``.

    Raises:
        RecipeError: If there is none, with the nearest name, or if there are several.
    """
    known, wanted = shipped_recipes(), name.removesuffix(".yaml").removeprefix("recipes/")
    found = [key for key in (f"{folder}/{wanted}", wanted) if key in known][:1]
    found = found or [key for key in known if key.rpartition("/")[2] == wanted]
    if len(found) == 1:
        return known[found[0]]
    if found:
        raise RecipeError(f"{name}: {' and '.join(found)} are shipped; give one of these names")
    hint = nearest(wanted, known) or f"There are {', '.join(known)}"
    raise RecipeError(f"no recipe {name!r} is shipped. {hint}")


def recipe_path(given: str, folder: str = "") -> str:
    """The path of a recipe that is given by path or, where no such file exists, by the name of a shipped one.

    Args:
        given: A path, or a name without ``.yaml``.
        folder: Folder of the shipped recipes that is looked into first.

    Returns:
        The path, or `given` unchanged if it is neither: reading it says what is wrong.
    """
    return str(shipped_recipe(given, folder)) if given in {*names(folder)} and not is_file(given) else given


def names(folder: str = "") -> Iterator[str]:
    """What `recipe_path` takes for a shipped recipe: full names, and those within `folder` without it."""
    for name in shipped_recipes():
        yield name
        if folder and name.startswith(f"{folder}/"):
            yield name.removeprefix(f"{folder}/")
