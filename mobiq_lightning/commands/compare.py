"""``compare``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from mobiq_lightning.commands import argument_types
from mobiq_lightning.commands.command import Parser, unknown_option
from mobiq_lightning.commands.recipe_command import RecipeCommand
from mobiq_lightning.errors import RecipeError


class Compare(RecipeCommand):
    """Run strategies x seeds, and compare them at equal used bits.

    Each strategy of a grid runs with every seed as a run of its own; the same command goes on with what is not finished.
    """

    name = "compare"
    usage = "GRID [--seeds 0,1,2] [--bits 2,2.5,3] [--overwrite] [options] [--KEY VALUE ...]"
    recipe_help = "grid: a path, or the name of a shipped one such as budgets (`recipes ls`); the same as --config"

    def add_options(self, parser: Parser) -> None:
        """Declares what the command line changes of a grid."""
        parser.add_argument("--seeds", metavar="0,1,2", help="seeds instead of the grid's")
        parser.add_argument("--bits", metavar="2,2.5,3", help="used bits of the table instead of the grid's")
        parser.add_argument(
            "--folder", type=argument_types.folder, metavar="FOLDER", help="where runs, tables and the report go"
        )
        parser.add_argument("--workers", metavar="N", help="cells that run at the same time; auto: one per GPU, or one")
        parser.add_argument("--overwrite", action="store_true", help="remove what the folder holds of a comparison")

    def parse(self, parser: Parser, arguments: Sequence[str]) -> Namespace:
        """Reads the grid, the options, and the keys that are changed for all strategies."""
        given = super().parse(parser, arguments)
        pending = given.keys if not given.keys or given.keys[0].startswith("-") else ["--config", *given.keys]
        given.config, given.keys = "", {}
        while pending:
            name, equals, value = pending.pop(0).partition("=")
            key = "config" if name in ("--config", "-c") else name.removeprefix("--")
            if not name.startswith("-") or ("." not in key and key != "config"):
                raise RecipeError(unknown_option("compare", name, [o for o in parser.options if o != "--KEY"]))
            if not equals:
                if not pending:
                    raise RecipeError(f"compare: {name}: a value is missing")
                value = pending.pop(0)
            if key == "config":
                given.config = value
            else:
                given.keys[key] = _value(value, f"--{key}")
        if not given.config:
            raise RecipeError("compare: --config is missing; give a grid, as in --config recipes/compare/budgets.yaml")
        return given

    def run(self, given: Namespace) -> None:
        """Runs the grid."""
        from mobiq_lightning.comparison import compare

        compare(
            given.config,
            seeds=None if given.seeds is None else _list(given.seeds),
            bits=None if given.bits is None else _list(given.bits),
            folder=given.folder,
            workers=None if given.workers is None else _value(given.workers),
            overwrite=given.overwrite,
            **given.keys,
        )


def _list(text: str) -> list[Any]:
    """``0,1,2`` or ``[0, 1, 2]`` as a list; what is no number stays text, which the grid's check refuses."""
    return [_value(part) for part in text.strip("[]").split(",") if part.strip()]


def _value(text: str, option: str = "compare") -> Any:
    from mobiq_lightning.jobs import parse_value

    return parse_value(text, option)
