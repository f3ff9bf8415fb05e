"""The command line: a thin dispatcher. Heavy imports happen only once a command is known to be well-formed."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from mobiq_lightning.commands import COMMANDS, WIDTH
from mobiq_lightning.console import make_streams_usable, program
from mobiq_lightning.errors import RecipeError, nearest
from mobiq_lightning.jobs import exit_code
from mobiq_lightning.version import __version__

_HELP = """\
usage: {program} COMMAND [arguments]

Elastic quantization of LLaMA-family models: one checkpoint that runs at any average bit-width from 2 to 8.

commands:
{commands}

RUN is a run folder, an elastic checkpoint, or its id on the Hugging Face hub. RECIPE is a path, or the name of a shipped recipe:
`{program} recipes ls` lists them. Keys of a recipe are overridden on the command line, as in
  {program} fit tiny-ranges --model.epochs_per_block 3
`{program} COMMAND --help` lists all options and keys of a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command line without the program; by default that of the process.

    Returns:
        The exit code: 0 done, 1 failed, 2 asked for something that does not exist or is not installed, 130 interrupted,
        143 terminated.
    """
    make_streams_usable()
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if given[0] == "--version":
        print(f"mobiq-lightning {__version__}")
        return 0
    return exit_code(lambda: _dispatch(given[0], given[1:]))


def help_text() -> str:
    """The list of commands, each with its usage and what it does."""
    lines = []
    for command in COMMANDS.values():
        lines.append(f"  {command.name} {command.usage}")
        lines.append(textwrap.fill(command.summary(), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return _HELP.format(program=program(), commands="\n".join(lines))


def _dispatch(name: str, arguments: Sequence[str]) -> None:
    if name not in COMMANDS:
        raise RecipeError(f"no command {name!r}. {nearest(name, COMMANDS)} Commands: {', '.join(COMMANDS)}")
    COMMANDS[name](arguments)
