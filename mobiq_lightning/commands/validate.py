"""``validate``."""

from __future__ import annotations

from argparse import Namespace

from mobiq_lightning.commands.recipe_command import RecipeCommand


class Validate(RecipeCommand):
    """Compare a finished run again, at other bits or on other text."""

    name = "validate"
    usage = 'RUN [--model.eval_bits "[2.25, 3.25]"] [--KEY VALUE ...]'
    recipe_help = "run folder, or the recipe of the run"

    def run(self, given: Namespace) -> None:
        """Runs the job."""
        from mobiq_lightning.jobs import run_job

        run_job("validate", given.keys)
