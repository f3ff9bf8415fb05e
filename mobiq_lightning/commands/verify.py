"""``verify``."""

from __future__ import annotations

from argparse import Namespace

from mobiq_lightning.commands.argument_types import check_run
from mobiq_lightning.commands.command import RUN_HELP, Command, Parser
from mobiq_lightning.console import program
from mobiq_lightning.errors import CheckpointError


class Verify(Command):
    """Check every byte, shape, code and threshold, and a forward pass at every depth."""

    name = "verify"
    usage = "RUN"
    loads_checkpoint = True

    def add_arguments(self, parser: Parser) -> None:
        """Declares the run."""
        parser.add_argument("run", metavar="RUN", help=RUN_HELP)

    def run(self, given: Namespace) -> None:
        """Prints a line for each check, and what is damaged."""
        check_run(given.run)
        from mobiq_lightning.checkpoint import verify
        from mobiq_lightning.commands.progress import no_progress_bars
        from mobiq_lightning.runs import CHECKPOINTS, RunFolder

        no_progress_bars()
        problems = verify(given.run, _print_check)
        if problems:
            run = RunFolder(given.run)
            again = (
                f"If it is a run of yours, `{program()} fit {given.run}` builds it again from {CHECKPOINTS}/"
                if run.epochs_kept
                else "Copy it again from where it is whole"
            )
            raise CheckpointError(f"{given.run}: {len(problems)} problem(s). {again}")


def _print_check(name: str, problems: list[str]) -> None:
    print(f"{'ok     ' if not problems else 'DAMAGED'}  {name}", flush=True)
    for problem in problems:
        print(f"         - {problem}", flush=True)
