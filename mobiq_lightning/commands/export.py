"""``export``."""

from __future__ import annotations

from argparse import Namespace

from mobiq_lightning.commands import argument_types
from mobiq_lightning.commands.argument_types import check_run
from mobiq_lightning.commands.command import RUN_HELP, Command, Parser
from mobiq_lightning.errors import RecipeError


class Export(Command):
    """Copy a checkpoint, whole or with its first planes only."""

    name = "export"
    usage = "RUN --to FOLDER [--max-bits 4] [--overwrite]"

    def add_arguments(self, parser: Parser) -> None:
        """Declares the run, the new folder, and what is kept."""
        parser.add_argument("run", metavar="RUN", help=RUN_HELP)
        parser.add_argument("--to", type=argument_types.folder, metavar="FOLDER", help="the new folder")
        parser.add_argument(
            "--max-bits",
            type=argument_types.whole(1, argument_types.MOST_BITS),
            metavar="BITS",
            help="keep only the planes up to this depth; must be a prefix of the slices",
        )
        parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")

    def run(self, given: Namespace) -> None:
        """Writes the copy, and says how large it is."""
        if not given.to:
            raise RecipeError("export: --to is missing; give the new folder, as in --to exported")
        check_run(given.run)
        from mobiq_lightning.checkpoint import export

        folder = export(given.run, given.to, given.max_bits, given.overwrite)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"{folder}: {size / 1e6:,.1f} MB of tensors")
