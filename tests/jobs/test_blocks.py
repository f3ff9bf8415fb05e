"""Blocks that single processes calibrate from full-precision inputs, and the fit that takes them over."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from mobiq_lightning.calibration import BlockShare, ElasticCalibration, block_share, check_block_files
from mobiq_lightning.cli import main
from mobiq_lightning.errors import RecipeError, RunFolderError
from mobiq_lightning.jobs.asked_blocks import asked_blocks
from mobiq_lightning.runs import BlockFiles, RunFolder
from tests import processes
from tests.checkpoints import tensors_of
from tests.conftest import UNTIMED

STAGES = (
    "{depth: 2, train: [codes, ranges], epochs: 2, other_depths: {8: 1.0}}, {train: [routers], epochs: 1}",
    ", {depth: 3, train: [codes], epochs: 1, scope: model}, {depth: 4, train: [codes], epochs: 1}",
)
UNMEASURED = f"[{UNTIMED}, {{class_path: mobiq_lightning.callbacks.LayerGains, init_args: {{windows: 0}}}}]"


def in_folder(arguments: list[str], folder: Path, later: bool = False) -> list[str]:
    """A command line whose blocks are trained on full-precision inputs; then, if asked for, the whole model and blocks again."""
    stages = f"--model.stages=[{STAGES[0]}{STAGES[1] if later else ''}]"
    slices = "--model.slices={class_path: ProgressiveSlices, init_args: {group_size: 16}}"
    few = ["--model.eval_bits=[2, 2.5]", f"--trainer.callbacks={UNMEASURED}"]
    return [*arguments, slices, stages, "--model.block_inputs=full", *few, f"--trainer.default_root_dir={folder}"]


def learned_of(run: Path, block: int) -> dict[str, Any]:
    """What the file of a block holds of tensors, by name."""
    path = BlockFiles(run).whole()[block]
    content = torch.load(path, weights_only=True)
    averages = {f"{name}/{key}": v for name, state in content["optimizer"].items() for key, v in state.items()}
    return {**content["state_dict"], **averages}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("later", [False, True], ids=["blocks alone", "with stages of the whole model"])
def test_blocks_of_several_processes_make_bit_by_bit_the_checkpoint_of_one(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], later: bool
) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    assert main(["fit", *in_folder(recipe_arguments, one, later)]) == 0
    for own in ("2", "1") if later else ("2",):
        assert main(["fit", *in_folder(recipe_arguments, several, later), "--blocks", own]) == 0
    assert sorted(BlockFiles(several).whole()) == ([0, 1] if later else [1])
    assert not (several / "elastic").exists()
    capsys.readouterr()
    assert main(["fit", *in_folder(recipe_arguments, several, later)]) == 0
    assert "Block 2/2 is calibrated: taken over" in capsys.readouterr().err
    assert_same(*(tensors_of(run / "elastic") for run in (one, several)))
    results = [json.loads((run / "results.json").read_text()) for run in (one, several)]
    assert results[0]["rows"] == results[1]["rows"]
    assert results[0]["guards"] == results[1]["guards"]
    assert BlockFiles(several).whole() == {}
    assert (several / "blocks" / "2" / "metrics.jsonl").is_file()


def test_a_killed_process_goes_on_and_a_block_that_is_there_is_not_calibrated_again(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = ["fit", *in_folder(recipe_arguments, killed), "--blocks=1-2"]
    process = processes.start(command, tmp_path / "said.txt")
    kept = killed / "blocks" / "1-2" / "checkpoints"
    while process.is_alive() and not (kept / "epoch-000004.sha256").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    assert list(BlockFiles(killed).whole()) == [0]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "Resuming from epoch-00000" in said
    assert "block 1/2" not in said
    assert not kept.exists()
    assert main(["fit", *in_folder(recipe_arguments, whole), "--blocks=2"]) == 0
    assert_same(learned_of(killed, 1), learned_of(whole, 1))
    capsys.readouterr()
    assert main(command) == 0
    assert "stage 1" not in capsys.readouterr().err


def test_files_that_are_damaged_of_another_recipe_version_or_model_are_named(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    command = ["fit", *in_folder(recipe_arguments, run), "--blocks=1"]
    assert main(command) == 0
    learned, [path] = learned_of(run, 0), BlockFiles(run).whole().values()
    module: Any = SimpleNamespace(run_folder=run, share=BlockShare(recipe={}))
    capsys.readouterr()

    assert main([*command, "--model.rates.codes=0.002"]) != 0
    assert "model.rates.codes: 0.001 -> 0.002" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) != 0
    assert "--blocks 1 with --overwrite" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(block_share, "__version__", "9.9")
        with pytest.raises(RunFolderError, match=r"block-000001-\w+\.part was written by version .*, and this is 9\.9"):
            check_block_files(module, {})
    with pytest.raises(RunFolderError, match="is of another recipe:\n  seed_everything"):
        check_block_files(module, {})
    module.share.recipe = json.loads(torch.load(path, weights_only=True)["recipe"])
    with pytest.raises(RunFolderError, match=r"source weights: .* there, others here"):
        check_block_files(module, {"source weights": "others"})

    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(command) == 0
    assert f"{path} is damaged; block 1 is calibrated again" in capsys.readouterr().err
    assert_same(learned_of(run, 0), learned)


def test_a_block_in_work_is_left_to_its_process_and_keeps_the_whole_run_from_going_on(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = in_folder(recipe_arguments, run)
    other = BlockFiles(run)
    other.lock([1])
    for arguments in (["fit", *command, "--blocks=1-2"], ["fit", *command], ["fit", *command, "--overwrite"]):
        assert main(arguments) != 0
        said = capsys.readouterr().err
        assert f"{run}, block 2: process" in said
        assert "is at work on it; wait for it, or end it" in said
    assert not list((run / "blocks").glob("block-000001*"))
    other.release()
    assert not list((run / "blocks").iterdir())


def test_processes_with_other_blocks_claim_a_run_together_and_with_one_recipe(tmp_path: Path) -> None:
    recipe = {"model": {"block_inputs": "full"}}
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.claim_blocks(recipe, range(1))
    with pytest.raises(RunFolderError, match=r"holds a run with another recipe:\n  model\.block_inputs: 'full'"):
        second.claim_blocks({"model": {"block_inputs": "calibrated"}}, range(2, 3))
    second.claim_blocks(recipe, range(1, 3))
    with pytest.raises(RunFolderError, match=r"block 3: process \d+ on .* is at work on it"):
        RunFolder(tmp_path).claim_blocks(recipe, range(2, 4))
    second.release()
    with pytest.raises(RunFolderError, match="block 1: process"):
        RunFolder(tmp_path).lock()
    first.release()
    second.claim_blocks(recipe, range(4))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--blocks=2-3"], "--blocks 2-3: the model has 2 blocks, numbered from 1 to 2"),
        (["--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true"], "one process each. Give"),
    ],
)
def test_blocks_that_are_not_there_and_processes_that_share_batches_are_refused(
    recipe_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["fit", *in_folder(recipe_arguments, tmp_path / "run"), *arguments]) != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("blocks", "asked", "overwrite", "said"),
    [
        ("0-1", {}, False, "numbered from 1"),
        ("3-2", {}, False, "numbered from 1"),
        ("all", {}, False, "numbered from 1"),
        ("", {}, False, "numbered from 1"),
        ("1", {"model.block_inputs": "calibrated"}, False, "Set model.block_inputs to full"),
        ("1", {"model.block_inputs": None}, False, "Set model.block_inputs to full"),
        (
            "1",
            {"model.stages": [{"train": ["codes"], "scope": "model"}]},
            False,
            "begins with a stage of the whole model",
        ),
        ("1", {}, True, "would remove what other processes have calibrated"),
    ],
)
def test_blocks_that_cannot_be_calibrated_alone_are_refused_before_any_work(
    blocks: str, asked: dict[str, Any], overwrite: bool, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        asked_blocks(blocks, {"model.block_inputs": "full", **asked}, overwrite)


def test_blocks_are_given_from_one_as_they_are_counted_in_messages() -> None:
    asked = {"model.block_inputs": "full", "model.stages": [{"train": ["codes"]}, {"scope": "model"}]}
    assert [asked_blocks(blocks, asked, False) for blocks in ("1-8", "3")] == [range(8), range(2, 3)]


def test_a_block_that_fails_is_tried_again_as_in_one_process(
    recipe_arguments: list[str], tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block fails once: routers of the second begin as they would have, and the file says that it was tried again."""
    model = f"--model.pretrained={make_model(dtype=torch.bfloat16)}"
    step = ElasticCalibration.training_step
    failing = [True]

    def once(self: ElasticCalibration, batch: Any, batch_idx: int) -> Any:
        if self.block_index == 0 and self.current_epoch == 1 and failing.pop() if failing else False:
            for parameter in self.blocks[0].parameters():
                parameter.data.fill_(torch.nan)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ElasticCalibration, "training_step", once)
    both, last = tmp_path / "both", tmp_path / "last"
    assert main(["fit", *in_folder(recipe_arguments, both), model, "--blocks=1-2"]) == 0
    assert failing == []
    assert main(["fit", *in_folder(recipe_arguments, last), model, "--blocks=2"]) == 0
    assert_same(learned_of(both, 1), learned_of(last, 1))
    assert torch.load(BlockFiles(both).whole()[0], weights_only=True)["retries"] == 1
    assert main(["fit", *in_folder(recipe_arguments, both), model]) == 0
    assert RunFolder(both).retries.counts() == {0: 1}


def test_a_fit_begins_at_an_epoch_with_the_step_that_it_would_have() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    block_share.begin_at(trainer, 6, 16)
    assert (trainer.current_epoch, trainer.global_step) == (6, 96)
