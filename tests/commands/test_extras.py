"""Commands without the packages that they need, and serving without those that it does not need."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mobiq_lightning.commands import COMMANDS
from mobiq_lightning.errors import MissingExtraError
from mobiq_lightning.extras import EXTRAS, require
from tests.conftest import Run

BLOCKED = (
    "lightning",
    "jsonargparse",
    "datasets",
    "torchmetrics",
    "platformdirs",
    "matplotlib",
    "jinja2",
    "wandb",
    "lm_eval",
)
"""What the base installation does not bring, even by way of its own packages."""
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); "


def without_extras(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{BLOCK}from mobiq_lightning.cli import main; {code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_the_extras_are_those_of_the_installation() -> None:
    tomllib = pytest.importorskip("tomllib")
    path = Path(__file__).parents[2] / "pyproject.toml"
    declared = tomllib.loads(path.read_text())["project"]["optional-dependencies"]

    def modules(extra: str) -> set[str]:
        found: set[str] = set()
        for entry in declared[extra]:
            inner = re.match(r"mobiq-lightning\[(.*)\]", entry)
            names = [modules(name) for name in inner[1].split(",")] if inner else []
            found |= set().union(*names) if inner else {re.split(r"[\[<>=;]", entry)[0].replace("-", "_")}
        return found

    assert {extra: {*names} for extra, names in EXTRAS.items()} == {extra: modules(extra) for extra in EXTRAS}
    everything = set().union(*map(modules, EXTRAS))
    assert everything <= modules("test")
    assert {command.needs for command in COMMANDS.values()} <= {"", *EXTRAS}


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["fit", "tiny"], "calibrate"),
        (["validate", "tiny"], "calibrate"),
        (["compare", "budgets"], "calibrate"),
        (["outliers", "outliers"], "calibrate"),
        (["fit", "--help"], "calibrate"),
        (["latency"], "report"),
        (["evaluate", "run", "--tasks", "x"], "evaluate"),
    ],
)
def test_a_command_without_its_packages_says_in_a_line_what_to_install(
    arguments: list[str], extra: str, tmp_path: Path
) -> None:
    done = without_extras(f"sys.exit(main({arguments!r}))", tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {arguments[0]} needs ")
    assert line.endswith(f'not installed here: pip install "mobiq-lightning[{extra}]"')


def test_functions_say_it_as_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match="plots needs jinja2, not installed"):
        require("report", "plots")
    with pytest.raises(MissingExtraError):
        require("calibrate", "fit")


def test_a_checkpoint_is_served_by_the_base_installation(finished: Run, tmp_path: Path) -> None:
    run = str(finished[0])
    code = (
        f"assert main(['generate', {run!r}, '--prompt', 'import', '--max_new_tokens', '3']) == 0;"
        f"assert main(['inspect', {run!r}]) == 0; assert main(['verify', {run!r}]) == 0;"
        f"assert main(['export', {run!r}, '--to', 'four', '--max-bits', '4']) == 0;"
        "import mobiq_lightning; from mobiq_lightning.serving import measure_speed;"
        f"policy = mobiq_lightning.BitsPolicy.from_checkpoint({run!r}, max_perplexity_ratio=100);"
        "assert policy.bits_for_queue(3) == policy.bits;"
        "model = mobiq_lightning.load('four', bits=3.0);"
        "assert [row['bits'] for row in measure_speed(model, [2, 4], new_tokens=2, repeats=1)] == [2, 4]"
    )
    done = without_extras(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "code bits per weight" in done.stderr
