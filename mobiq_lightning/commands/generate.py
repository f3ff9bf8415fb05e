"""``generate``."""

from __future__ import annotations

import sys
from argparse import Namespace

from mobiq_lightning.commands import argument_types
from mobiq_lightning.commands.argument_types import check_run
from mobiq_lightning.commands.command import RUN_HELP, Command, Parser
from mobiq_lightning.console import as_utf8
from mobiq_lightning.errors import RecipeError


class Generate(Command):
    """Continue a prompt with a finished run, at any bits."""

    name = "generate"
    usage = 'RUN --prompt "..." [--bits 3.2] [options]'
    loads_checkpoint = True

    def add_arguments(self, parser: Parser) -> None:
        """Declares the run, the prompt, and how it is continued."""
        parser.add_argument("run", metavar="RUN", help=RUN_HELP)
        parser.add_argument("--prompt", default="", metavar="TEXT", help="text to continue")
        parser.add_argument(
            "--bits",
            type=argument_types.number(0, argument_types.MOST_BITS, above=True),
            default=4.0,
            metavar="BITS",
            help="average bits per weight to run at (default 4)",
        )
        parser.add_argument(
            "--max-new-tokens",
            type=argument_types.whole(1, 10**6),
            default=64,
            metavar="N",
            help="tokens to add at most (64)",
        )
        parser.add_argument(
            "--temperature",
            type=argument_types.temperature,
            default=0.0,
            metavar="T",
            help="0 takes the likeliest token (default); above, tokens are sampled at this temperature",
        )
        parser.add_argument(
            "--seed", type=argument_types.whole(0, 2**63 - 1), default=0, metavar="N", help="seed of the sampling (0)"
        )
        parser.add_argument(
            "--max-bits",
            type=argument_types.whole(1, argument_types.MOST_BITS),
            metavar="BITS",
            help="load only the planes up to this depth",
        )

    def run(self, given: Namespace) -> None:
        """Prints the text on standard output, and the bits that were used on standard error."""
        if not given.prompt.strip():
            raise RecipeError(
                'generate: --prompt is missing or empty; give the text to continue, as in --prompt "Once upon"'
            )
        check_run(given.run)
        from mobiq_lightning.commands.progress import no_progress_bars
        from mobiq_lightning.serving import continue_prompt

        no_progress_bars()
        prompt = as_utf8(given.prompt)
        text, used = continue_prompt(
            given.run, prompt, given.bits, given.max_new_tokens, given.temperature, given.seed, given.max_bits
        )
        print(text)
        print(
            f"[{given.bits:g} bits asked for; used {used.code_bits:.3f} code bits per weight, {used.all_in_bits:.3f} with "
            f"scales and routers, over {used.n_tokens} tokens]",
            file=sys.stderr,
        )
