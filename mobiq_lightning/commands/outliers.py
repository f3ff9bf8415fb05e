"""``outliers``."""

from __future__ import annotations

from argparse import Namespace

from mobiq_lightning.commands import argument_types
from mobiq_lightning.commands.command import Parser, number_list
from mobiq_lightning.commands.recipe_command import RecipeCommand


class Outliers(RecipeCommand):
    """Calibrate for each precision alone, read each at all of them: which tokens suffer where.

    Each calibration is a run of its own within the run folder; the same command goes on with what is not finished.
    """

    name = "outliers"
    usage = "RECIPE [--bits 2,3,4] [--share 0.1] [--overwrite] [--KEY VALUE ...]"

    def add_options(self, parser: Parser) -> None:
        """Declares what the recipe does not say."""
        parser.add_argument(
            "--bits", default="", metavar="2,3,4", help="precisions; by default all depths of the recipe's slices"
        )
        parser.add_argument(
            "--share",
            type=argument_types.number(0, 1, above=True),
            default=0.1,
            help="part of the tokens that counts as worst (default 0.1)",
        )
        parser.add_argument("--overwrite", action="store_true", help="remove the runs that the run folder holds")

    def run(self, given: Namespace) -> None:
        """Runs the study."""
        bits = number_list("outliers", "--bits", given.bits, int, argument_types.MOST_BITS)
        from mobiq_lightning.jobs import run_outliers

        run_outliers([*given.keys, *(["--overwrite"] if given.overwrite else [])], bits, given.share)
