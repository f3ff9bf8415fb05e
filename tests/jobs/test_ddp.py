"""Two processes on one machine."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from mobiq_lightning.cli import main
from tests.checkpoints import tensors_of
from tests.processes import start_together

DDP = ["--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true"]


def in_folder(arguments: list[str], folder: Path) -> list[str]:
    return [*arguments, f"--trainer.default_root_dir={folder}"]


def rows_of(run: Path) -> dict[tuple[str, float], dict[str, Any]]:
    """Rows of the results of a run, by allocation and budget."""
    rows = json.loads((run / "results.json").read_text())["rows"]
    return {(row["allocation"], row["target_bits"]): row for row in rows}


def losses_of(run: Path) -> list[float]:
    """The mean loss of each epoch of a run, as it was logged last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["epoch"]: line[k] for line in lines for k in ("block/loss_epoch", "model/loss_epoch") if k in line}
    return [loss for _, loss in sorted(found.items())]


def until(seen: Callable[[], Any], process: BaseProcess) -> None:
    """Waits until something is seen, while a process is alive."""
    while not seen():
        assert process.is_alive()
        time.sleep(0.01)


def test_two_processes_measure_every_window_once(recipe_arguments: list[str], tmp_path: Path) -> None:
    together = start_together(["fit", *recipe_arguments, *DDP, "--data.eval_max_windows=7"], tmp_path, 2)
    for process in together:
        process.join(120)
    assert [process.exitcode for process in together] == [0, 0], (tmp_path / "0").read_text()
    single = tmp_path / "single"
    assert main(["fit", *in_folder(recipe_arguments, single), "--data.eval_max_windows=7"]) == 0
    both, one = (rows_of(run) for run in (tmp_path / "run", single))
    for key, row in one.items():
        if key[0] in ("full", "rtn"):  # these do not depend on the order of the calibration windows
            assert abs(both[key]["perplexity"] / row["perplexity"] - 1) < 1e-6
    both, one = (json.loads((run / "diagnostics.json").read_text()) for run in (tmp_path / "run", single))
    positions = lambda found: [(c["class"], c["tokens"]) for c in found["budgets"][0]["by_position"]]
    assert positions(both) == positions(one)
    errors = lambda found: torch.tensor(found["block_error"]["relative_error"])
    assert both["block_error"]["tokens"] > 0
    assert bool((errors(both)[:, 0] > errors(both)[:, -1]).all())


def test_ddp_that_would_drift_apart_is_refused(recipe_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *recipe_arguments, "--trainer.devices=2", "--trainer.strategy=ddp"]) == 2
    assert "use ddp_find_unused_parameters_true" in capsys.readouterr().err


def test_two_processes_learn_what_one_does_and_go_on_when_one_of_them_was_killed(
    recipe_arguments: list[str], tmp_path: Path
) -> None:
    stages = (
        "--model.stages=[{epochs: 1, train: [codes, ranges], depth: 2}, {epochs: 1, train: [codes], depth: 4}, "
        "{epochs: 1, train: [routers]}, {epochs: 1, train: [codes], depth: 8, scope: model}, "
        "{epochs: 1, train: [routers], scope: model}]"
    )
    slices = "--model.slices={class_path: ProgressiveSlices, init_args: {slice_bits: [2, 1, 1, 2, 2], group_size: 16}}"
    given = [*recipe_arguments, slices, stages, "--model.rates.codes=1e-2", "--data.n_generated=4"]
    command = ["fit", *given, *DDP, "--data.batch_size=2", "--data.eval_batch_size=4"]
    first, second = start_together(command, tmp_path, 2)
    until(lambda: list((tmp_path / "run" / "checkpoints").glob("epoch-*.sha256")), first)
    second.kill()
    first.join(60)
    assert first.exitcode == 1
    lost = r"error: rank 0 of 2 has lost another process of this run.* the same command goes on"
    assert re.search(lost, (tmp_path / "0").read_text())
    together = start_together(command, tmp_path, 2)
    for process in together:
        process.join(120)
    said = (tmp_path / "0").read_text()
    assert [process.exitcode for process in together] == [0, 0], said
    assert "Resuming from epoch-" in said
    assert main(["fit", *in_folder(given, tmp_path / "single"), "--data.batch_size=4"]) == 0
    runs = tmp_path / "run", tmp_path / "single"
    both, one = (tensors_of(run / "elastic") for run in runs)
    codes = [(both[name], one[name]) for name in one if "plane_" in name]
    assert sum(int((x != y).sum()) for x, y in codes) <= 1e-3 * sum(x.numel() for x, _ in codes)
    # What is learned differs by the order of sums alone; where a token is near a threshold, its gate makes more of it.
    losses = [losses_of(run)[-6:] for run in runs]  # the killed process may not have logged its first epoch
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    rows, alone = map(rows_of, runs)
    for key, row in alone.items():
        limit = 1e-4 if key[1] in (2, 8) or key[0] in ("full", "rtn") else 0.03
        assert rows[key]["perplexity"] == pytest.approx(row["perplexity"], rel=limit), key
        assert rows[key]["used_bits"] == pytest.approx(row["used_bits"], abs=0.02), key
    assert rows["router", 2.0]["kl"] < rows["rtn", 2.0]["kl"]
    gains = [[row["probes"] for row in json.loads((run / "layer_gains.json").read_text())["rows"]] for run in runs]
    assert gains[0] == pytest.approx(gains[1], rel=1e-3, abs=1e-4)
