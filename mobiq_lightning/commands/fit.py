"""``fit``."""

from __future__ import annotations

from argparse import Namespace

from mobiq_lightning.commands.command import Parser
from mobiq_lightning.commands.recipe_command import RecipeCommand


class Fit(RecipeCommand):
    """Calibrate, tune thresholds, compare, save one elastic checkpoint.

    The same command resumes an interrupted run; a finished one is shown again.
    """

    name = "fit"
    usage = "RECIPE [--overwrite] [--KEY VALUE ...]"

    def add_options(self, parser: Parser) -> None:
        """Declares what is no part of a recipe."""
        parser.add_argument("--overwrite", action="store_true", help="remove the run that the run folder holds")

    def run(self, given: Namespace) -> None:
        """Runs the job."""
        from mobiq_lightning.jobs import run_job

        run_job("fit", [*given.keys, *(["--overwrite"] if given.overwrite else [])])
