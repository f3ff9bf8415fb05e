"""``latency``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from mobiq_lightning.commands import argument_types
from mobiq_lightning.commands.argument_types import check_run
from mobiq_lightning.commands.command import RUN_HELP, Command, Parser
from mobiq_lightning.errors import RecipeError


class Latency(Command):
    """Time the kernels, or the CPU reference, beside plain weights.

    On CUDA the Triton kernels are timed, elsewhere the CPU reference; the output says which. Weights are random.
    """

    name = "latency"
    usage = "[RUN] [--shapes NAMES] [--sections NAMES] [--to FOLDER] [--tune | --warm-up] [options]"
    long = True
    loads_checkpoint = True
    needs = "report"

    def add_arguments(self, parser: Parser) -> None:
        """Declares whose shapes are timed, and what is done."""
        parser.add_argument("run_folder", metavar="RUN", nargs="?", help=f"{RUN_HELP}: take its shapes")
        parser.add_argument(
            "--shapes",
            default="",
            metavar="NAMES",
            help="instead: llama-2-7b, llama-3-8b, llama-3-70b, small, a part such as llama-2-7b.down, or ROWSxCOLUMNS, "
            "separated by commas",
        )
        parser.add_argument(
            "--sections",
            default="",
            metavar="NAMES",
            help="check, ceilings, decode, batch, prefill, model, separated by commas; by default all that the device has",
        )
        parser.add_argument(
            "--to",
            type=argument_types.folder,
            default="latency",
            metavar="FOLDER",
            help="where latency.json and latency.png go (default latency)",
        )
        parser.add_argument(
            "--minutes",
            type=argument_types.number(0, 1e5, above=True),
            default=9.0,
            metavar="M",
            help="stop after so long, and keep the rows (default 9)",
        )
        parser.add_argument(
            "--tune",
            action="store_true",
            help="instead: find how the kernels divide their work best on this GPU, and write the table of it",
        )
        parser.add_argument(
            "--warm-up",
            action="store_true",
            help="instead: compile all kernels that RUN needs on this GPU, so that serving it does not",
        )

    def run(self, given: Namespace) -> None:
        """Measures, tunes or compiles."""
        if given.tune and given.warm_up:
            raise RecipeError("latency: --tune and --warm-up are two different things; give one")
        if given.warm_up and not given.run_folder:
            raise RecipeError("latency: --warm-up needs a run, as in latency runs/tiny --warm-up")
        from mobiq_lightning.latency import check_names

        run = "" if given.run_folder is None else given.run_folder
        check_names(run, given.shapes, given.sections)
        if given.run_folder is not None:
            check_run(run)
        from mobiq_lightning.commands.progress import no_progress_bars

        no_progress_bars()
        if given.warm_up:
            from mobiq_lightning.commands.warming import warm_up_checkpoint

            warm_up_checkpoint(run)
        elif given.tune:
            from mobiq_lightning.latency import tune_here

            tune_here(run, given.shapes, Path(given.to), given.minutes)
        else:
            from mobiq_lightning.latency import measure

            measure(run, given.shapes, given.sections, Path(given.to), given.minutes)
