"""What holds for every test: it can fail, and its markers say what it costs."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import mobiq_lightning
from mobiq_lightning.cli import main
from tests.markers import COLLECTED, COSTS, FAST, costs_of, functions_of

TESTS = Path(__file__).parent
MODULES = sorted(TESTS.rglob("*.py"))
MEASURED = {"raises", "warns", "fail", "check_returncode"}
"""Functions of pytest and subprocess that end a test which does not hold."""


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions_in(path: Path) -> Iterator[ast.FunctionDef]:
    """Functions and methods of a module, not those within functions."""
    for node in parsed(path).body:
        for found in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(found, ast.FunctionDef):
                yield found


def name_called(call: ast.Call) -> str:
    """The last part of what is called: `raises` of `pytest.raises(...)`."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def can_fail(function: ast.FunctionDef, helpers: set[str]) -> bool:
    """Whether a function asserts anything itself, or calls what does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = name_called(node)
            checked = any(k.arg == "check" and ast.unparse(k.value) == "True" for k in node.keywords)
            if name in MEASURED or name.startswith("assert_") or name in helpers or (name == "run" and checked):
                return True
    return False


def asserting_helpers() -> set[str]:
    """Names of functions of the tests, other than tests, that assert, directly or through one another."""
    functions = [f for path in MODULES for f in functions_in(path) if not f.name.startswith("test_")]
    helpers: set[str] = set()
    while more := {f.name for f in functions if f.name not in helpers and can_fail(f, helpers)}:
        helpers |= more
    return helpers


def test_every_test_can_fail() -> None:
    helpers = asserting_helpers()
    idle = [
        f"{path.relative_to(TESTS)}: {function.name}"
        for path in MODULES
        for function in functions_in(path)
        if function.name.startswith("test_") and not can_fail(function, helpers)
    ]
    assert idle == []


def test_a_test_that_asserts_nothing_is_found() -> None:
    def found(body: str) -> bool:
        return can_fail(ast.parse(f"def test_it() -> None:\n    {body}").body[0], {"check_files"})  # type: ignore[arg-type]

    assert not found("compute()")
    assert not found("subprocess.run(command)")
    for body in ("assert x", "check_files(x)", "torch.testing.assert_close(a, b)", "subprocess.run(c, check=True)"):
        assert found(body)


@pytest.mark.parametrize("time", ["first", "second"])
def test_no_test_finds_what_another_left_in_the_environment(time: str) -> None:
    assert os.environ.setdefault("LEFT_BY_A_TEST", time) == time
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    os.environ["HF_HUB_OFFLINE"] = "0"


def test_settings_of_whoever_calls_the_tests_do_not_reach_them() -> None:
    code = "import os, tests.conftest; print(sorted(n for n in os.environ if n.startswith(('WANDB_', 'MOBIQ_'))))"
    outer = {**os.environ, "WANDB_MODE": "offline", "MOBIQ_TUNED": "/nowhere", "MOBIQ_CACHE": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], env=outer, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.stdout == "['WANDB_SILENT']\n", done.stderr


def runs() -> None:
    main([])


def runs_through_another() -> None:
    runs()


def runs_later() -> Callable[[], int]:
    return lambda: main([])


def imports_when_it_runs() -> Callable[[list[str]], int]:
    from mobiq_lightning.cli import main as run

    return run


def starts_a_process() -> None:
    subprocess.run([sys.executable, "-m", "mobiq_lightning", "fit"], check=True)


def starts_a_process_with_code() -> None:
    subprocess.run([sys.executable, "-c", "from mobiq_lightning.cli import main; main([])"], check=True)


def multiplies() -> type:
    from mobiq_lightning.latency.kernel_products import KernelProducts

    return KernelProducts


def calls_the_function() -> Any:
    return mobiq_lightning.fit("tiny")


class Methods:
    def runs(self) -> None:
        main([])

    def runs_through_itself(self) -> None:
        self.runs()


@pytest.mark.parametrize(
    ("function", "costs"),
    [
        (runs, {"e2e"}),
        (runs_through_another, {"e2e"}),
        (runs_later, {"e2e"}),
        (imports_when_it_runs, {"e2e"}),
        (starts_a_process, {"e2e"}),
        (starts_a_process_with_code, {"e2e"}),
        (calls_the_function, {"e2e"}),
        (Methods.runs_through_itself, {"e2e"}),
        (multiplies, {"interpreter"}),
        (functions_in, {FAST}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_costs_of_a_test_are_found_in_what_it_reaches(function: FunctionType, costs: set[str]) -> None:
    assert costs_of([function], Methods) == costs


@cache
def calls_main(function: FunctionType) -> bool:
    """Whether a function has a call of the command line written in it."""
    return re.search(r"\bmain\(\[", inspect.getsource(function)) is not None


def test_every_test_has_a_marker_and_those_that_run_commands_say_so(request: pytest.FixtureRequest) -> None:
    items = request.config.stash[COLLECTED]
    assert request.node.nodeid in {item.nodeid for item in items}
    for item in items:
        found = {marker.name for marker in item.iter_markers()} & {*COSTS, FAST}
        assert found == {FAST} or (found and FAST not in found), f"{item.nodeid} is marked {sorted(found)}"
        if "recipe_arguments" in item.fixturenames or any(map(calls_main, functions_of(item))):
            assert "e2e" in found, f"{item.nodeid} runs a command, and is marked {sorted(found)}"
