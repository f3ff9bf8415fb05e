"""`check`: what a recipe takes and everything that keeps it from running, before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mobiq_lightning.cli import main
from mobiq_lightning.jobs import run_check


def test_a_recipe_that_can_run_is_described_and_its_run_folder_left_alone(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no cell is folded
    assert main(["check", *recipe_arguments]) == 0
    printed = capsys.readouterr().out
    for said in (
        "LlamaForCausalLM, 2 blocks",
        "14: 4 x (32 x 32), 4 x (16 x 32), 4 x (44 x 32), 2 x (32 x 44)",
        "99.1% of those in blocks",
        "16 columns",
        "windows of 32, asked for 8",
        "mlp.down_proj: 44 columns are no multiple of the groups of 16; the last group of each row has 12",
        "memory, block stages",
        "memory, comparison",
        "time, stage 2",
        "This recipe can run.",
    ):
        assert said in printed
    assert not (tmp_path / "run").exists()


def test_json_holds_the_same_in_bytes_and_seconds(
    recipe_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *recipe_arguments, "--json", "--data.n_generated=4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["can_run"] is True
    assert found["problems"] == []
    assert found["model"]["shapes"] == [[32, 32, 4], [16, 32, 4], [44, 32, 4], [32, 44, 2]]
    assert found["model"]["sliced"] == 4 * 32 * 32 + 4 * 16 * 32 + 6 * 32 * 44
    assert [phase["name"] for phase in found["memory"]] == ["text writing", "block stages", "layer gains", "comparison"]
    assert all(phase["host"] > 0 for phase in found["memory"])
    assert found["text"][0]["asked"] == 8
    assert found["time"]["seconds"] == pytest.approx(
        sum(phase["steps"] * phase["seconds"] for phase in found["time"]["phases"])
    )


def test_all_problems_are_in_one_list(
    recipe_arguments: list[str],
    make_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shutil.copytree(make_model(), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    code = main(["check", *recipe_arguments, f"--model.pretrained={model}", "--data.n_samples=100000"])
    output = capsys.readouterr()
    assert code == 1
    assert f"{model} holds no weights" in output.out
    assert "data.n_samples asks for 100000" in output.out
    assert "run holds results.json but no config.yaml" in output.out
    assert "LlamaForCausalLM, 2 blocks" in output.out, "the shapes are known from config.json"
    assert "this recipe cannot run: 3 problems" in output.err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["results.json"]


def test_a_key_that_does_not_exist_and_a_model_that_is_not_there_are_both_said(
    recipe_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *recipe_arguments, "--model.routr=x", "--model.pretrained=/no/such/model"]) == 1
    printed = capsys.readouterr().out
    assert "model.routr: no such key. Did you mean 'model.router'" in printed
    assert "there is no folder /no/such/model" in printed


def test_what_does_not_fit_is_a_problem_with_the_figures(
    recipe_arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mobiq_lightning.calibration.planning.plan.available_memory", lambda: 10**8)
    monkeypatch.setattr("mobiq_lightning.calibration.planning.plan.resident_memory", lambda: 0)
    assert main(["check", *recipe_arguments]) == 1
    printed = capsys.readouterr().out
    assert (
        "memory: block stages will take about 0.7 GB on the host, of which 0.1 GB are free; lower data.n_samples"
        in printed
    )
    assert "no step was measured, as there is too little memory" in printed


def test_a_recipe_that_is_not_there_is_an_error_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tini"]) == 2
    assert "Did you mean 'tiny'" in capsys.readouterr().err


def test_steps_that_are_measured_wait_for_no_other_process(
    recipe_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = "--model.stages=[{epochs: 1, train: [ranges, routers]}, {epochs: 1, train: [routers], scope: model}]"
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)  # there is no group to gather in
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    report = run_check([*recipe_arguments, stages])
    assert report.plan is not None
    assert report.plan.unmeasured == ""
