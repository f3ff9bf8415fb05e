"""``validate``."""

from __future__ import annotations

from argparse import Namespace

from mobiq_lightning.commands.command import ALL_HELP, Parser
from mobiq_lightning.commands.recipe_command import RecipeCommand
from mobiq_lightning.console import whole_tables


class Validate(RecipeCommand):
    """Compare a finished run again, at other bits or on other text.

    What it measures is put beside what the run has measured; on another text it is written into other_protocols/.
    """

    name = "validate"
    usage = 'RUN [--model.eval_bits "[2.25, 3.25]"] [--all] [--KEY VALUE ...]'
    recipe_help = "run folder, or the recipe of the run"

    def add_options(self, parser: Parser) -> None:
        """Declares what is no part of a recipe."""
        parser.add_argument("--all", action="store_true", help=ALL_HELP)

    def run(self, given: Namespace) -> None:
        """Runs the job."""
        from mobiq_lightning.jobs import run_job

        with whole_tables(given.all):
            run_job("validate", given.keys)
