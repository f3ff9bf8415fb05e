"""The one grammar of the command line: what every command is made of, and what it answers to a wrong argument."""

from __future__ import annotations

import argparse
import inspect
import re
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

from mobiq_lightning.console import Verbosity, program, telling
from mobiq_lightning.errors import RecipeError, nearest, shown
from mobiq_lightning.extras import require

Number = TypeVar("Number", int, float)

WIDTH = 110
"""Columns of help texts."""
RUN_HELP = "run folder, elastic checkpoint, or its id on the Hugging Face hub"

ALL_HELP = "show every row of the comparison; by default router, rounding and the best control of each budget"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps at the width of the help of commands, whatever the terminal's."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=WIDTH)


class Parser(argparse.ArgumentParser):
    """Raises a `RecipeError` of one line where `argparse` would print its usage and leave the process.

    Args:
        prog: What the user types: the program and the command.
        **settings: Of `argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, **settings: Any) -> None:
        self.options: list[str] = []
        self.valued: list[str] = []
        super().__init__(prog=prog, allow_abbrev=False, **settings)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Declares an argument; `options` holds the names of those with dashes, `valued` of those that take a value."""
        found = [name for name in names if name.startswith("--")]
        self.options += found
        self.valued += found if "action" not in settings else []
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises what is wrong, after the name of the command."""
        said = re.sub(r"^argument ", "", message).replace("expected one argument", "a value is missing")
        said = said.replace("the following arguments are required:", "missing:")
        command = self.prog.rpartition(" ")[2]
        raise RecipeError(f"{command}: {said}. `{self.prog} --help` lists what there is")


class Command(ABC):
    """A command: its name and usage, its arguments, and what it runs. Its docstring is its help.

    `-` and `_` are the same in the names of options. Subclasses import what is heavy in `run`, when arguments are well-formed.
    """

    name: ClassVar[str]
    usage: ClassVar[str]
    """Its arguments as the list of commands shows them."""
    needs: ClassVar[str] = ""
    """Extra of the installation without which it cannot run; empty for none."""
    long: ClassVar[bool] = False
    """Whether it works for long, and says how far it is."""
    loads_checkpoint: ClassVar[bool] = False
    """Whether it loads an elastic checkpoint, which may name a router that is none of this package."""

    def __call__(self, arguments: Sequence[str]) -> None:
        """Runs the command.

        Args:
            arguments: What follows its name.

        Raises:
            RecipeError: If they are not well-formed.
            MissingExtraError: If packages that the command needs are not installed.
            MobiqError: Whatever the command itself cannot do.
        """
        parser = self.parser()
        if {"-h", "--help"} & {*arguments}:
            print(self.help(parser), end="")
            return
        given = self.parse(parser, arguments)
        if self.needs:
            require(self.needs, self.name)
        with telling(self._verbosity(given)):
            if not self.loads_checkpoint:
                self.run(given)
                return
            from mobiq_lightning.checkpoint import LoadCall, answering

            with answering(LoadCall(trust_router=given.trust_router)):
                self.run(given)

    def _verbosity(self, given: Namespace) -> Verbosity:
        if not self.long:
            return "usual"
        if given.quiet and given.verbose:
            raise RecipeError(f"{self.name}: --quiet and --verbose are two different things; give one")
        return "quiet" if given.quiet else "verbose" if given.verbose else "usual"

    def add_common(self, parser: Parser) -> None:
        """Declares what all commands have that work for long."""
        if self.long:
            parser.add_argument("-q", "--quiet", action="store_true", help="print errors and results alone")
            parser.add_argument("-v", "--verbose", action="store_true", help="print what libraries say themselves, too")

    @classmethod
    def summary(cls) -> str:
        """What the command does, in a line."""
        return (cls.__doc__ or "").partition("\n")[0]

    def help(self, parser: Parser) -> str:
        """What ``COMMAND --help`` prints."""
        return parser.format_help()

    def parser(self) -> Parser:
        """The parser of its arguments."""
        description, _, epilog = inspect.cleandoc(self.__doc__ or "").partition("\n\n")
        parser = Parser(
            f"{program()} {self.name}",
            usage=f"{program()} {self.name} {self.usage}",
            description=description,
            epilog=epilog or None,
            formatter_class=_Formatter,
        )
        self.add_arguments(parser)
        self.add_common(parser)
        if self.loads_checkpoint:
            parser.add_argument(
                "--trust-router",
                metavar="CLASS",
                help="dotted path of RUN's router if it is one of your own: it is imported and run",
            )
        return parser

    def parse(self, parser: Parser, arguments: Sequence[str]) -> Namespace:
        """Reads a command line.

        Raises:
            RecipeError: With the nearest name if there is no such option.
        """
        normal = joined(parser, normalized(parser.options, arguments))
        for name in (a.partition("=")[0] for a in normal if a.startswith("--")):
            if name not in parser.options:
                raise RecipeError(unknown_option(self.name, name, parser.options))
        return parser.parse_args(normal)

    @abstractmethod
    def add_arguments(self, parser: Parser) -> None:
        """Declares the arguments of the command."""

    @abstractmethod
    def run(self, given: Namespace) -> None:
        """Runs the command on arguments that are well-formed."""


def normalized(known: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Arguments with the names of options as they are declared: ``--max_bits`` is ``--max-bits``."""
    found = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        dashed = name.replace("_", "-")
        found.append(dashed + equals + value if dashed in known and name.startswith("--") else argument)
    return found


def joined(parser: Parser, arguments: Sequence[str]) -> list[str]:
    """Arguments with the value of each option behind an equals sign, so that a value may begin with dashes.

    Args:
        parser: The parser that declares the options.
        arguments: Arguments with the names of options as they are declared.
    """
    found, pending = [], list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument in parser.valued and pending and pending[0].partition("=")[0] not in parser.options:
            argument += f"={pending.pop(0)}"
        found.append(argument)
    return found


def unknown_option(command: str, name: str, known: Sequence[str]) -> str:
    """What is said to an option that does not exist."""
    plain = [option.removeprefix("--") for option in known]
    hint = nearest(name.removeprefix("--").replace("_", "-"), plain) or f"There are {', '.join(known)}"
    return f"{command}: {name}: no such option. {hint}"


def number_list(command: str, option: str, text: str, kind: Callable[[str], Number], high: float = 8) -> list[Number]:
    """Numbers of an option such as ``--bits 2,3,4``; brackets around them are allowed.

    Args:
        command: The command, for the message.
        option: The option, for the message.
        text: What was given.
        kind: `float`, or `int` where only whole numbers make sense.
        high: The highest that makes sense; all must be above 0.

    Raises:
        RecipeError: If a part is no number of that kind, or out of range.
    """
    try:
        found = [kind(part) for part in text.strip("[] ").split(",") if part.strip()]
    except ValueError as error:
        what = "whole bits" if kind is int else "numbers"
        raise RecipeError(
            f"{command}: {option} {shown(text)[1:-1]}: give {what} separated by commas, as in {option} 2,3,4"
        ) from error
    wrong = [value for value in found if not 0 < value <= high]  # NaN is not
    if wrong:
        raise RecipeError(f"{command}: {option} {shown(wrong[0])}: numbers above 0 and at most {high:g} are expected")
    return found
