"""What a test costs, found from the code that it reaches, so that nobody has to remember a marker."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

COSTS = ("interpreter", "compiler", "e2e", "browser")
"""Markers of tests that cost more than a moment; pyproject.toml says what such a test does."""
FAST = "fast"
"""Marker of all other tests."""
CLI = "mobiq_lightning.cli"
JOBS = {"fit", "validate", "compare"}
"""Functions of the package that do what commands do."""
COLLECTED = pytest.StashKey[list[pytest.Function]]()
"""In the stash of pytest's configuration: all tests that were collected, also those that `-m` leaves out."""

USE_KERNELS = {"switch_kernels", "attach_kernels", "KernelProducts"}
"""Names whose use brings a model or a product onto the kernels."""


def mark(item: pytest.Function) -> None:
    """Gives a test the markers of its costs, or `fast` if it has none of its own either."""
    given = {marker.name for marker in item.iter_markers()} & set(COSTS)
    found = costs_of(functions_of(item), item.cls, item.fixturenames) | given
    for name in sorted((found - {FAST} or {FAST}) - given):
        item.add_marker(name)


def costly_files_first(tests: list[pytest.Function]) -> list[pytest.Function]:
    """The tests in an order in which processes that take whole files end at the same time: fast ones fill the end."""
    ranks: dict[Path, int] = {}
    for test in tests:
        rank = min((COSTS.index(m.name) for m in test.iter_markers() if m.name in COSTS), default=len(COSTS))
        ranks[test.path] = min(rank, ranks.get(test.path, rank))
    return sorted(tests, key=lambda test: ranks[test.path])


def functions_of(item: pytest.Function) -> list[FunctionType]:
    """The function of a test and those of the fixtures that it uses."""
    fixtures = [item._fixtureinfo.name2fixturedefs.get(name, ()) for name in item.fixturenames]
    functions = [item.function, *(definition.func for definitions in fixtures for definition in definitions)]
    functions = [getattr(function, "__func__", function) for function in functions]
    return [function for function in functions if isinstance(function, FunctionType) and is_ours(function)]


def is_ours(value: Any) -> bool:
    """Whether something is defined in the tests, other than here, where commands are named and not run."""
    module = getattr(value, "__module__", None) or ""
    return module.startswith("tests.") and module != __name__


def costs_of(functions: Iterable[FunctionType], owner: type | None = None, fixtures: Iterable[str] = ()) -> set[str]:
    """The markers of a test: some of `COSTS`, or `FAST` alone.

    Args:
        functions: the test and its fixtures.
        owner: the class of the test, whose methods are reached through `self`.
        fixtures: names of all fixtures that the test uses.
    """
    found = {"e2e"} if "recipe_arguments" in fixtures else set()
    for code, named in reached(functions, owner):
        texts = set(texts_of(code))
        if any(getattr(value, "__module__", None) == CLI for value in named) or CLI in code.co_names:
            found.add("e2e")
        if any(is_job(value, code.co_names) for value in named):
            found.add("e2e")
        if any(is_script(value, code.co_names) for value in named):
            found.add("e2e")
        if "mobiq_lightning" in texts or any(CLI in text for text in texts):  # python -m, python -c
            found.add("e2e")
        if any(map(is_written_in_triton, named)) or USE_KERNELS & set(code.co_names):
            found.add("interpreter")
        if "benchmarks.compiled_kernels" in texts:
            found.add("compiler")
        if any("chromium" in value for value in named if isinstance(value, tuple)):
            found.add("browser")
    return found or {FAST}


def reached(functions: Iterable[FunctionType], owner: type | None) -> Iterator[tuple[CodeType, list[Any]]]:
    """All code of the tests that functions reach, each piece with the objects that it names."""
    waiting, seen = list(functions), set()
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        for code in nested(function.__code__):
            named = [
                space[n]
                for space in (function.__globals__, vars(owner) if owner else {})
                for n in code.co_names
                if n in space
            ]
            yield code, named
            waiting += [value for value in named if isinstance(value, FunctionType) and is_ours(value)]


def nested(code: CodeType) -> Iterator[CodeType]:
    """A code object and those of the functions and classes within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


def texts_of(code: CodeType) -> Iterator[str]:
    """String constants of a code object, also those within tuples."""
    for constant in code.co_consts:
        for value in constant if isinstance(constant, tuple) else (constant,):
            if isinstance(value, str):
                yield value


def is_script(value: Any, names: Iterable[str]) -> bool:
    """Whether an object is the command line of a script in benchmarks/, or such a script whose command line is named."""
    if isinstance(value, ModuleType):
        return value.__name__.startswith("benchmarks.") and "main" in names
    return isinstance(value, FunctionType) and value.__module__.startswith("benchmarks.") and value.__name__ == "main"


def is_job(value: Any, names: Iterable[str]) -> bool:
    """Whether an object is a function that does what a command does, or the package, one of whose functions is named."""
    if isinstance(value, ModuleType):
        return value.__name__ == "mobiq_lightning" and bool(JOBS & set(names))
    of_package = (getattr(value, "__module__", None) or "").startswith("mobiq_lightning.")
    return of_package and isinstance(value, FunctionType) and value.__name__ in JOBS


def is_written_in_triton(value: Any) -> bool:
    """Whether an object comes from a module that imports Triton."""
    module = value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
    return module is not None and module.__name__.startswith("mobiq_lightning.") and "triton" in vars(module)
