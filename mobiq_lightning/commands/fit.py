"""``fit``."""

from __future__ import annotations

import time
from argparse import Namespace

from mobiq_lightning.commands.command import ALL_HELP, Parser
from mobiq_lightning.commands.recipe_command import RecipeCommand
from mobiq_lightning.console import is_first_process, whole_tables


class Fit(RecipeCommand):
    """Calibrate, tune thresholds, compare, save one elastic checkpoint.

    The same command resumes an interrupted run; a finished one is shown again.
    """

    name = "fit"
    usage = "RECIPE [--overwrite] [--blocks FIRST-LAST] [--all] [--KEY VALUE ...]"

    def add_options(self, parser: Parser) -> None:
        """Declares what is no part of a recipe."""
        parser.add_argument("--overwrite", action="store_true", help="remove the run that the run folder holds")
        parser.add_argument(
            "--blocks",
            metavar="FIRST-LAST",
            help="calibrate these blocks alone, numbered from 1, and leave them in the run folder for a fit without --blocks; "
            "takes model.block_inputs full",
        )
        parser.add_argument("--all", action="store_true", help=ALL_HELP)

    def run(self, given: Namespace) -> None:
        """Runs the job, and says what it made."""
        from mobiq_lightning.jobs import run_job

        started = time.monotonic()
        with whole_tables(given.all):
            run = run_job("fit", [*given.keys, *(["--overwrite"] if given.overwrite else [])], given.blocks)
        if is_first_process() and given.blocks is None:
            from mobiq_lightning.commands.ending import say_what_was_made

            say_what_was_made(run, time.monotonic() - started)
