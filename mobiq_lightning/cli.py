"""The command line: a thin dispatcher. Heavy imports happen only once a command is known to be well-formed."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mobiq_lightning.errors import RecipeError, nearest
from mobiq_lightning.jobs import exit_code

HELP = """\
usage: python -m mobiq_lightning COMMAND [arguments]

Elastic quantization of LLaMA-family models: one checkpoint that runs at any average bit-width from 2 to 8.

commands:
  fit --config RECIPE.yaml        calibrate, tune thresholds, compare, save one elastic checkpoint; the same command
                                  resumes an interrupted run
  validate --config RECIPE.yaml   compare a finished run again, at other bits or on other text
  generate RUN --prompt "..."     continue a prompt with a finished run, at any --bits
  export RUN --to FOLDER          copy a checkpoint; --max-bits 4 keeps only the first planes
  inspect RUN                     what a checkpoint holds: layers, planes, routers, measured bits, provenance
  verify RUN                      check every byte, shape, code and threshold, and a forward pass at every depth
  evaluate RUN --tasks A,B        tasks of lm-evaluation-harness at --bits 2,3,4 (pip install "mobiq-lightning[evaluate]")
  compare --config GRID.yaml      run strategies x seeds, and compare them at equal used bits; grids are in recipes/compare/
  outliers --config RECIPE.yaml   calibrate for each of --bits 2,3,4 alone, read each at all of them; which tokens suffer where
  latency                         time the kernels, or the CPU reference, beside plain weights; latency RUN takes RUN's shapes

RUN is a run folder, an elastic checkpoint, or its id on the Hugging Face hub.

Recipes are in recipes/; keys are overridden on the command line, as in
  python -m mobiq_lightning fit --config recipes/tiny.yaml --model.epochs_per_block 2
`COMMAND --help` lists all keys of a command.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command line without the program; by default that of the process.

    Returns:
        The exit code: 0 done, 1 failed, 2 asked for something that does not exist.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    command, rest = given[0], given[1:]
    if command == "--version":
        from mobiq_lightning.version import __version__

        print(f"mobiq-lightning {__version__}")
        return 0
    return exit_code(lambda: _dispatch(command, rest))


def _dispatch(command: str, rest: list[str]) -> None:
    commands: dict[str, Callable[[str, list[str]], None]] = {"fit": _train, "validate": _train}
    commands |= dict.fromkeys(("generate", "export", "inspect", "verify", "evaluate", "latency"), _run)
    commands |= {"compare": _compare, "outliers": _outliers}
    if command not in commands:
        raise RecipeError(f"no command {command!r}. {nearest(command, commands)} Commands: {', '.join(commands)}")
    commands[command](command, rest)


def _train(command: str, rest: list[str]) -> None:
    from mobiq_lightning.jobs import check_arguments

    check_arguments(rest)
    from mobiq_lightning.jobs import ElasticCLI

    ElasticCLI([command, *rest])


def _compare(command: str, rest: list[str]) -> None:
    from mobiq_lightning.comparison import compare

    compare(rest)


def _outliers(command: str, rest: list[str]) -> None:
    from mobiq_lightning.jobs import check_arguments

    check_arguments(rest, options=("bits", "share"))
    from mobiq_lightning.jobs import OutliersCLI

    OutliersCLI(rest)


def _run(command: str, rest: list[str]) -> None:
    from mobiq_lightning.commands import COMMANDS, run

    run(COMMANDS[command], rest)
