"""``evaluate``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from mobiq_lightning.commands import argument_types
from mobiq_lightning.commands.argument_types import check_run
from mobiq_lightning.commands.command import RUN_HELP, Command, Parser, number_list
from mobiq_lightning.errors import RecipeError


class Evaluate(Command):
    """Run tasks of lm-evaluation-harness at several bits, and append what they give to results.json."""

    name = "evaluate"
    usage = "RUN --tasks A,B [--bits 2,3,4] [options]"
    loads_checkpoint = True
    long = True
    needs = "evaluate"

    def add_arguments(self, parser: Parser) -> None:
        """Declares the run, the tasks, and how they are run."""
        parser.add_argument("run", metavar="RUN", help=RUN_HELP)
        parser.add_argument("--tasks", default="", metavar="A,B", help="names of tasks, or paths of task YAML files")
        parser.add_argument("--bits", default="2,3,4", help="budgets, separated by commas (default 2,3,4)")
        parser.add_argument(
            "--limit", type=argument_types.whole(1, 10**9), metavar="N", help="examples per task at most"
        )
        parser.add_argument(
            "--num-fewshot",
            type=argument_types.whole(0, 10**4),
            metavar="N",
            help="examples in the prompt; by default what the task says",
        )
        parser.add_argument(
            "--batch-size",
            type=argument_types.whole(1, 10**6),
            default=8,
            metavar="N",
            help="requests at once (default 8)",
        )
        parser.add_argument("--include-path", metavar="FOLDER", help="folder with further task YAML files")
        parser.add_argument(
            "--source", metavar="MODEL", help="full-precision model to evaluate beside: folder or hub id"
        )
        parser.add_argument(
            "--max-bits",
            type=argument_types.whole(1, argument_types.MOST_BITS),
            metavar="BITS",
            help="load only the planes up to this depth",
        )

    def run(self, given: Namespace) -> None:
        """Prints a table, and stores it with the checkpoint."""
        names = [name for name in given.tasks.split(",") if name]
        if not names:
            raise RecipeError(
                "evaluate: --tasks is missing; name tasks or task files, as in --tasks arc_easy,my_task.yaml"
            )
        budgets = number_list("evaluate", "--bits", given.bits, float, argument_types.MOST_BITS)
        if not budgets:
            raise RecipeError("evaluate: --bits is empty; give budgets, as in --bits 2,3,4")
        check_run(given.run)
        from mobiq_lightning.commands.progress import no_progress_bars
        from mobiq_lightning.evaluation import evaluate_checkpoint, print_harness

        no_progress_bars()
        found = evaluate_checkpoint(
            given.run,
            names,
            budgets,
            limit=given.limit,
            num_fewshot=given.num_fewshot,
            batch_size=given.batch_size,
            include_path=Path(given.include_path) if given.include_path else None,
            source=given.source,
            max_bits=given.max_bits,
        )
        print_harness(found)
