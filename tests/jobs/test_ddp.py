"""Two processes on one machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mobiq_lightning.cli import main
from tests.checkpoints import tensors_of


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mobiq_lightning", "fit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_two_processes_learn_the_same_and_measure_every_window_once(
    recipe_arguments: list[str], tmp_path: Path
) -> None:
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true", "--data.eval_max_windows=7"]
    done = run([*recipe_arguments, *ddp])
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    tensors = tensors_of(tmp_path / "run" / "elastic")
    assert all(bool(torch.isfinite(v.float()).all()) for v in tensors.values())
    single = tmp_path / "single"
    arguments = [a for a in recipe_arguments if "default_root_dir" not in a] + [f"--trainer.default_root_dir={single}"]
    assert main(["fit", *arguments, "--data.eval_max_windows=7"]) == 0
    alone = json.loads((single / "results.json").read_text())
    pick = lambda r: {(x["allocation"], x["target_bits"]): x["perplexity"] for x in r["rows"]}
    for key, perplexity in pick(alone).items():
        if key[0] in ("full", "rtn"):  # these do not depend on the order of the calibration windows
            assert abs(pick(results)[key] / perplexity - 1) < 1e-6
    both, one = (json.loads((run / "diagnostics.json").read_text()) for run in (tmp_path / "run", single))
    positions = lambda found: [(c["class"], c["tokens"]) for c in found["budgets"][0]["by_position"]]
    assert positions(both) == positions(one)
    errors = lambda found: torch.tensor(found["block_error"]["relative_error"])
    assert both["block_error"]["tokens"] > 0
    assert bool((errors(both)[:, 0] > errors(both)[:, -1]).all())


def test_ddp_that_would_drift_apart_is_refused(recipe_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *recipe_arguments, "--trainer.devices=2", "--trainer.strategy=ddp"]) == 2
    assert "use ddp_find_unused_parameters_true" in capsys.readouterr().err


def test_two_processes_train_the_same_slices_block_by_block_and_end_to_end(
    recipe_arguments: list[str], tmp_path: Path
) -> None:
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true"]
    stages = (
        "--model.stages=[{epochs: 1, train: [codes, ranges], depth: 2}, {epochs: 1, train: [codes], depth: 4}, "
        "{epochs: 1, train: [codes], depth: 8, scope: model}, {epochs: 1, train: [routers], scope: model}]"
    )
    slices = "--model.slices={class_path: ProgressiveSlices, init_args: {slice_bits: [2, 1, 1, 2, 2], group_size: 16}}"
    done = run([*recipe_arguments, *ddp, slices, stages, "--model.rates.codes=1e-2", "--data.n_generated=4"])
    assert done.returncode == 0, done.stderr  # at the end of every visit the processes compare what they have learned
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    kl = {(r["allocation"], r["target_bits"]): r["kl"] for r in rows}
    assert kl["router", 2.0] < kl["rtn", 2.0]
