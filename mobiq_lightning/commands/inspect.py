"""``inspect``."""

from __future__ import annotations

from argparse import Namespace

from mobiq_lightning.commands.argument_types import check_run
from mobiq_lightning.commands.command import ALL_HELP, RUN_HELP, Command, Parser
from mobiq_lightning.console import whole_tables


class Inspect(Command):
    """Show what a checkpoint holds: layers, planes, routers, measured bits, provenance."""

    name = "inspect"
    usage = "RUN [--all]"
    loads_checkpoint = True

    def add_arguments(self, parser: Parser) -> None:
        """Declares the run."""
        parser.add_argument("run", metavar="RUN", help=RUN_HELP)
        parser.add_argument("--all", action="store_true", help=ALL_HELP)

    def run(self, given: Namespace) -> None:
        """Prints tables."""
        check_run(given.run)
        from mobiq_lightning.checkpoint import summarize_checkpoint
        from mobiq_lightning.commands.summary import print_summary

        summary = summarize_checkpoint(given.run)
        with whole_tables(given.all):
            print_summary(summary)
