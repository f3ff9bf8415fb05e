"""What a run survives: kills, damaged checkpoints, numbers that are none."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mobiq_lightning.calibration import SafeCheckpointIO
from mobiq_lightning.cli import main
from mobiq_lightning.strategies import ResidualSlices, Router
from tests import processes
from tests.checkpoints import tensors_of
from tests.conftest import Run, small_recipe


def assert_same(one: Path, other: Path) -> None:
    first, second = tensors_of(one / "elastic"), tensors_of(other / "elastic")
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


def arguments_for(recipe_arguments: list[str], folder: Path) -> list[str]:
    kept = [a for a in recipe_arguments if not a.startswith("--trainer.default_root_dir")]
    return [*kept, f"--trainer.default_root_dir={folder}", "--model.epochs_per_block=4", "--model.eval_bits=[2, 4]"]


@pytest.mark.parametrize(
    "strategies",
    [
        ["--model.router=MLPRouter"],
        ["--model.router=RandomRouter"],
        ["--model.router=ErrorSketchRouter", "--model.transform=LearnableEquivalentTransform"],
        [
            "--model.slices={class_path: ProgressiveSlices, init_args: {slice_bits: [2, 1, 1, 2, 2], group_size: 16}}",
            # Nine epochs: the first kill falls on the first slice, the second on a slice after a stage of the whole model.
            "--model.stages=[{epochs: 2, train: [codes, ranges], depth: 2}, "
            "{epochs: 1, train: [codes, ranges], depth: 2, scope: model}, {epochs: 1, train: [codes], depth: 8}, "
            "{epochs: 2, train: [routers], scope: model}]",
            "--data.n_generated=8",
        ],
    ],
    ids=["MLPRouter", "RandomRouter", "ErrorSketchRouter and LearnableEquivalentTransform", "ProgressiveSlices"],
)
def test_a_killed_run_goes_on_and_ends_bit_by_bit_as_if_it_had_not_been(
    recipe_arguments: list[str], tmp_path: Path, strategies: list[str]
) -> None:
    recipe_arguments = [*recipe_arguments, *strategies, "--data.n_samples=16"]
    assert main(["fit", *arguments_for(recipe_arguments, tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    # The first kill falls into the first block, the second into the second one.
    for epochs in (2, 6):
        process = processes.start(["fit", *arguments_for(recipe_arguments, killed)], tmp_path / "said.txt")
        while process.is_alive() and not list(killed.glob(f"checkpoints/epoch-{epochs - 1:06d}.sha256")):
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    assert not (killed / "results.json").exists()
    assert main(["fit", *arguments_for(recipe_arguments, killed)]) == 0
    assert_same(tmp_path / "whole", killed)
    rows = [json.loads((run / "results.json").read_text())["rows"] for run in (tmp_path / "whole", killed)]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def whole(make_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of eight epochs and its arguments. Not to be changed by tests, which take copies."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = arguments_for(small_recipe(make_model(), text_file, folder), folder / "run")
    assert main(["fit", *arguments]) == 0
    return folder / "run", arguments


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole[0], tmp_path / "run")
    (run / "results.json").unlink()
    newest = max((run / "checkpoints").glob("epoch-*.ckpt"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    newest.write_bytes(data)
    (run / "checkpoints" / "block-epoch-000007.ckpt").write_bytes(data)
    capsys.readouterr()
    assert main(["fit", *arguments_for(whole[1], run)]) == 0
    error = capsys.readouterr().err
    assert f"{newest.name} is damaged" in error
    assert "Resuming from epoch-000006.ckpt" in error
    assert_same(whole[0], run)


def test_a_run_of_which_every_checkpoint_is_one_file_goes_on(whole: Run, tmp_path: Path) -> None:
    run = shutil.copytree(whole[0], tmp_path / "run")
    checkpoints = run / "checkpoints"
    for path in checkpoints.glob("*.ckpt"):
        data = SafeCheckpointIO().load_checkpoint(path)
        torch.save(data, path)
        path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    for path in (*checkpoints.glob("*.part"), *checkpoints.glob("*epoch-000007.*")):
        path.unlink()
    shutil.rmtree(run / "elastic")
    (run / "results.json").unlink()
    assert main(["fit", *arguments_for(whole[1], run)]) == 0
    assert_same(whole[0], run)


def test_a_run_that_was_killed_after_the_last_epoch_only_exports_and_compares(whole: Run, tmp_path: Path) -> None:
    run = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(run / "elastic")
    (run / "results.json").unlink()
    assert main(["fit", *arguments_for(whole[1], run)]) == 0
    assert_same(whole[0], run)


class FailingSlices(ResidualSlices):
    """Gives NaN in the second block as long as `failures` are left, as an overflow would."""

    failures = 0
    calls = 0

    def prefixes(self, weight: torch.Tensor) -> torch.Tensor:
        FailingSlices.calls += torch.is_grad_enabled()
        if torch.is_grad_enabled() and FailingSlices.failures and FailingSlices.calls > 20:
            FailingSlices.failures -= 1
            return super().prefixes(weight) * float("nan")
        return super().prefixes(weight)


def failing(recipe_arguments: list[str], folder: Path) -> list[str]:
    slices = f"--model.slices={{class_path: {__name__}.FailingSlices, init_args: {{group_size: 16}}}}"
    return [*arguments_for(recipe_arguments, folder), slices]


def test_a_block_with_nan_starts_anew_at_a_lower_rate_and_blocks_before_it_are_kept(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FailingSlices, "failures", 1)
    monkeypatch.setattr(FailingSlices, "calls", 0)
    assert main(["fit", *failing(recipe_arguments, tmp_path / "run")]) == 0
    error = capsys.readouterr().err
    assert "error_routed = nan" in error
    assert "starts anew at 0.2 of the learning rates, in float32" in error
    assert (tmp_path / "run" / "results.json").is_file()
    assert sum(json.loads((tmp_path / "run" / "retries.json").read_text()).values()) == 1
    assert all(bool(torch.isfinite(v.float()).all()) for v in tensors_of(tmp_path / "run" / "elastic").values())


def test_a_block_that_keeps_failing_stops_the_run_with_the_numbers(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FailingSlices, "failures", 1000)
    monkeypatch.setattr(FailingSlices, "calls", 0)
    assert main(["fit", *failing(recipe_arguments, tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    for part in ("try 3 of block", "Learning rates: ranges", "Largest input of the block", "Finished blocks are kept"):
        assert part in error


class ConstantRouter(Router):
    """Cannot tell tokens apart."""

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return -torch.arange(self.n_slices - 1.0).expand(*x.shape[:-1], -1)


def test_a_collapsed_router_is_reported_and_its_input_gets_static_depths(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    router = f"--model.router={__name__}.ConstantRouter"
    assert main(["fit", *recipe_arguments, router]) == 0
    assert "Router collapse: at" in capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["collapsed"]) == 8
    assert set(results["collapsed"].values()) == {1.0}
    row = next(r for r in results["rows"] if r["allocation"] == "router" and r["target_bits"] == 2.5)
    assert row["used_bits"] == pytest.approx(2.5, abs=0.1)
