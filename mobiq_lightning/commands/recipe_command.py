"""Commands that take a recipe, and any key of it on the command line."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from mobiq_lightning.commands.command import Command, Parser, joined, normalized
from mobiq_lightning.console import program
from mobiq_lightning.extras import require


class RecipeCommand(Command):
    """A command that takes a recipe; keys that are not its own options are the recipe's, as in ``--model.rates.routers 0.1``."""

    needs = "calibrate"
    long = True
    recipe_help = "recipe: a path, or the name of a shipped one (`recipes ls`); the same as --config"

    def add_options(self, parser: Parser) -> None:
        """Declares the options that are no keys of the recipe."""

    def add_arguments(self, parser: Parser) -> None:
        """Declares what the help shows: the recipe, the command's own options, and how keys are given."""
        parser.add_argument("recipe", metavar="RECIPE", nargs="?", help=self.recipe_help)
        parser.add_argument(
            "-c", "--config", metavar="RECIPE", help="the recipe; of several, later ones override earlier ones"
        )
        self.add_options(parser)
        parser.add_argument("--KEY", metavar="VALUE", help="any key of the recipe, as in --data.n_samples 64")

    def parse(self, parser: Parser, arguments: Sequence[str]) -> Namespace:
        """Reads the command's own options; `keys` holds what is left, which is the recipe's."""
        own = Parser(f"{program()} {self.name}", add_help=False)
        self.add_options(own)
        self.add_common(own)
        given, keys = own.parse_known_args(joined(own, normalized(own.options, arguments)))
        given.keys = keys
        return given

    def help(self, parser: Parser) -> str:
        """Options, and all keys that a recipe has.

        Raises:
            MissingExtraError: If Lightning, whose trainer has some of the keys, is not installed.
        """
        require(self.needs, self.name)
        from mobiq_lightning.jobs import describe_keys

        return f"{super().help(parser)}\n{describe_keys(f'{program()} {self.name}')}"
