"""``inspect``."""

from __future__ import annotations

from argparse import Namespace

from mobiq_lightning.commands.argument_types import check_run
from mobiq_lightning.commands.command import RUN_HELP, Command, Parser


class Inspect(Command):
    """Show what a checkpoint holds: layers, planes, routers, measured bits, provenance."""

    name = "inspect"
    usage = "RUN"
    loads_checkpoint = True

    def add_arguments(self, parser: Parser) -> None:
        """Declares the run."""
        parser.add_argument("run", metavar="RUN", help=RUN_HELP)

    def run(self, given: Namespace) -> None:
        """Prints tables."""
        check_run(given.run)
        from mobiq_lightning.checkpoint import summarize_checkpoint
        from mobiq_lightning.commands.summary import print_summary

        print_summary(summarize_checkpoint(given.run))
