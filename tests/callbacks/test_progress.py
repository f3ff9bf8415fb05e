"""What a run says while it goes on: every phase, with the time that is left of all of it."""

from __future__ import annotations

import re

import pytest

from mobiq_lightning.callbacks import progress
from mobiq_lightning.cli import main


def test_every_long_phase_says_how_far_it_is_and_what_is_left_of_the_run(
    recipe_arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_BETWEEN_LINES", -1.0)
    assert main(["fit", *recipe_arguments, "--data.n_generated=4"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert re.match(r"fit in .*run: model .*, text .* and 4 windows that the model writes", lines[0])
    assert "99.1% of those in blocks" in lines[1]
    assert lines[2].startswith("plan: text writing, 2 stages, then thresholds, layer gains, comparison")
    phases = (
        "text writing",
        "block 1/2, step",
        "layer gains",
        "thresholds",
        "comparison",
        "comparison of the controls",
    )
    for phase in phases:
        of_phase = [line for line in lines if line.startswith(f"{phase} ")]
        assert of_phase, phase
        assert all(re.search(r", ETA \d+:\d\d$", line) for line in of_phase)
    assert any(re.match(r"block 2/2, epoch 2/2, loss .*, peak .* GB, ETA ", line) for line in lines)


def test_quiet_leaves_results_and_nothing_else(recipe_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *recipe_arguments, "--quiet", "--model.eval_bits=[2]"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "router" in output.out
    assert main(["fit", *recipe_arguments, "-q", "--model.eval_bits=[9]"]) == 2
    assert capsys.readouterr().err.startswith("error: model.eval_bits: 9 is out of range")


def test_quiet_and_verbose_are_not_given_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "tiny", "--quiet", "-v"]) == 2
    assert "--quiet and --verbose are two different things" in capsys.readouterr().err
