"""``recipes``."""

from __future__ import annotations

import textwrap
from argparse import Namespace
from pathlib import Path

from mobiq_lightning.commands.command import WIDTH, Command, Parser
from mobiq_lightning.console import MODULE, program
from mobiq_lightning.errors import RecipeError, nearest

_ACTIONS = ("ls", "cp")


class Recipes(Command):
    """List the shipped recipes and grids, or copy one to change it.

    A shipped recipe also runs by its name, as in `fit tiny` and `compare budgets`.
    """

    name = "recipes"
    usage = "ls | cp NAME [TARGET]"

    def add_arguments(self, parser: Parser) -> None:
        """Declares what is done with which recipe."""
        parser.add_argument("action", metavar="ls | cp", help="list the recipes, or copy one")
        parser.add_argument("recipe", metavar="NAME", nargs="?", help="recipe to copy, as `recipes ls` names it")
        parser.add_argument(
            "target", metavar="TARGET", nargs="?", default=".", help="file or folder to copy to (default: this folder)"
        )

    def run(self, given: Namespace) -> None:
        """Prints the list, or copies."""
        if given.action not in _ACTIONS:
            raise RecipeError(f"recipes: no action {given.action!r}. {nearest(given.action, _ACTIONS) or 'ls or cp'}")
        if given.action == "cp":
            if not given.recipe:
                raise RecipeError(
                    "recipes cp: give the name of a recipe, as in `recipes cp tiny`; `recipes ls` lists them"
                )
            copy(given.recipe, Path(given.target))
            return
        if given.recipe:
            raise RecipeError(f"recipes ls: takes no name; `recipes cp {given.recipe}` copies that recipe")
        from mobiq_lightning.jobs import shipped_recipes

        indent = " " * 23
        lines = [
            textwrap.fill(f"{name:22} {purpose(path)}", WIDTH, subsequent_indent=indent)
            for name, path in shipped_recipes().items()
        ]
        lines += ["", f"`{program()} recipes cp NAME` copies one; `{program()} fit tiny` runs one by its name."]
        print("\n".join(lines))  # at once, so that `| head` does not end in a broken pipe


def copy(name: str, target: Path) -> Path:
    """Copies a shipped recipe, and prints the command that runs the copy.

    Args:
        name: As `recipes ls` names it.
        target: File, or folder that is there.

    Returns:
        The copy. Its first line, the command that runs it, names the copy.

    Raises:
        RecipeError: If no such recipe is shipped, or if the file is there already or its folder is not.
    """
    from mobiq_lightning.jobs import shipped_recipe, shipped_recipes

    path, copied = shipped_recipe(name), target
    shipped = next(key for key, found in shipped_recipes().items() if found == path)
    try:
        copied = target / path.name if target.is_dir() else target
        if not copied.parent.is_dir():
            raise RecipeError(f"recipes cp: there is no folder {copied.parent}; make it, or give another target")
        content = path.read_text(encoding="utf-8").replace(f"recipes/{shipped}.yaml", copied.as_posix())
        with copied.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError as error:
        raise RecipeError(
            f"recipes cp: {copied} is there already and is left as it is; give another file, as in "
            f"`recipes cp {name} my-{copied.name}`"
        ) from error
    except (OSError, ValueError) as error:  # no permission, a name that is too long or holds what names cannot
        raise RecipeError(f"recipes cp: {copied} cannot be written ({error}); give another target") from error
    command = content.partition("\n")[0].removeprefix("# ").replace(MODULE, program())
    print(f"{copied}: change it as you like, then\n  {command}")
    return copied


def purpose(path: Path) -> str:
    """The first sentence of what a recipe's comment says of it, after the command that runs it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("#").strip() for line in lines[2:] if line.startswith("#")]
    return " ".join(comment).partition(". ")[0].rstrip(".") if comment else ""
