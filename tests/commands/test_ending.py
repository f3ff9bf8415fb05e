"""The end of a fit: what was made, where, how large, how long it took, and commands that work."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from mobiq_lightning.checkpoint import summarize_checkpoint
from mobiq_lightning.cli import main
from mobiq_lightning.commands.ending import say_what_was_made
from mobiq_lightning.console import MODULE
from mobiq_lightning.runs import RunFolder
from tests.conftest import Run


def test_it_says_what_was_made_and_the_commands_that_it_names_work(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished[0], tmp_path / "a run")
    say_what_was_made(RunFolder(run), 3732.4)
    made, figures, *commands = capsys.readouterr().err.splitlines()
    source = json.loads((run / "elastic" / "provenance.json").read_text())["source"]
    model = Path(next(a for a in finished[1] if a.startswith("--model.pretrained=")).partition("=")[2])
    assert source["name"] == model.name
    assert source["bytes"] == sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert made.startswith(f"Made {run / 'elastic'}: {source['name']} at any average from 2 to 8 bits, 0.0")
    assert made.endswith(f" of the source's {source['bytes'] / 1e6:.2f} MB, in 1 h 2 min 12 s.")
    share = float(made.split("of tensors, ")[1].split("%")[0]) / 100
    assert share == pytest.approx(summarize_checkpoint(run).n_bytes / source["bytes"], abs=0.006)
    assert str(run / "results.csv") in figures
    assert all(line.startswith(f"  {MODULE} ") for line in commands)
    for line in commands:
        assert main(shlex.split(line.strip().removeprefix(MODULE))) == 0
    output = capsys.readouterr()
    assert "[3.2 bits asked for" in output.err
    assert "│ shuffled tokens" in output.out


@pytest.mark.parametrize(("found", "said"), [("begun", "in 59 s, what was left of the run."), ("finished", "MB.")])
def test_it_does_not_count_what_was_done_before(
    finished: Run, found: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(finished[0])
    run.found = found  # type: ignore[assignment]
    say_what_was_made(run, 59.4)
    assert capsys.readouterr().err.splitlines()[0].endswith(said)


def test_the_table_of_a_finished_run_is_shown_whole_if_asked_for(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *finished[1]]) == 0
    short = capsys.readouterr()
    assert "│ best control: " in short.out
    assert "│ shuffled tokens" not in short.out
    assert short.err.splitlines()[-1] == f"  {MODULE} inspect {finished[0]} --all"
    assert "Made" not in short.err
    assert main(["fit", *finished[1], "--all"]) == 0
    assert "│ shuffled tokens" in capsys.readouterr().out
    assert main(["inspect", str(finished[0])]) == 0
    assert "│ shuffled tokens" not in capsys.readouterr().out
