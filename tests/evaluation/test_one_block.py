"""Models that are larger than their device: one block at a time is there, and what is measured is the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mobiq_lightning
from mobiq_lightning.calibration.many_readings import ManyReadings
from mobiq_lightning.cli import main
from mobiq_lightning.evaluation import BlockErrors, Comparison
from mobiq_lightning.nn import BlockLayout, HostTensors, OneBlockAtATime, SlicedLinear, full_precision
from mobiq_lightning.runtime import elastic_block_by_block
from mobiq_lightning.sources import ComparisonPass, load_source
from tests.conftest import Run

CPU = torch.device("cpu")


def models(finished: Run) -> tuple[Any, Any]:
    """The source model of a run, and its elastic model."""
    pretrained = next(a for a in finished[1] if a.startswith("--model.pretrained=")).partition("=")[2]
    return load_source(pretrained, "auto").model, mobiq_lightning.load(finished[0])


def compared(pair: tuple[Any, Any], by_block: bool) -> Comparison:
    makes = ManyReadings if by_block else None
    return Comparison(*pair, BlockLayout(), [2, 3.5, 8], [0], "layer", CPU, 0, by_block=makes)


def batches(count: int, tokens: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (count, 2, tokens), generator=generator)
    return [{"input_ids": batch, "labels": batch} for batch in ids]


def run(comparison: Comparison, count: int = 2, tokens: int = 12) -> list[Any]:
    for number, batch in enumerate(batches(count, tokens)):
        comparison.step(batch, ComparisonPass.ROUTER, number)
    comparison.start_second_pass()
    for number, batch in enumerate(batches(count, tokens)):
        comparison.step(batch, ComparisonPass.CONTROLS, number)
    return comparison.rows()


def tensors_of(block: nn.Module) -> Iterator[Tensor]:
    """Tensors of a block and of the slice schemes of its linears."""
    for module in (block, *(m.scheme for m in block.modules() if isinstance(m, SlicedLinear))):
        yield from module.parameters()
        yield from module.buffers()


class Watch(TorchDispatchMode):
    """Notes operations, but copies, that read what blocks have on the host."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.host = {t.untyped_storage().data_ptr() for block in blocks for t in tensors_of(block) if t.numel()}
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = ("aten::_to_copy", "aten::clone", "aten::detach", "aten::copy_", "aten::_foreach_copy_", "aten::zero_")
        if func.name() not in copies:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if any(t.untyped_storage().data_ptr() in self.host for t in given if t.numel()):
                self.found.add(func.name())
        return func(*args, **(kwargs or {}))


def test_the_comparison_of_models_that_come_block_by_block_is_the_same_bit_by_bit(finished: Run) -> None:
    assert run(compared(models(finished), by_block=True)) == run(compared(models(finished), by_block=False))


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="the interpreter runs kernels without a GPU")
def test_kernels_multiply_the_block_that_is_there_as_they_multiply_the_whole_model(finished: Run) -> None:
    pairs = models(finished), models(finished)
    for _, elastic in pairs:
        elastic.switch_kernels()
    one, whole = (compared(pair, by_block) for pair, by_block in zip(pairs, (True, False), strict=True))
    batch = batches(1, 3)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(one.elastic(input_ids=batch).logits, whole.elastic(input_ids=batch).logits)
    assert whole.inputs[0].kernel is not None
    assert all(routed.kernel is None for routed in one.inputs)


def test_nothing_is_computed_on_what_blocks_have_on_the_host_and_never_is_more_than_one_elsewhere(
    finished: Run,
) -> None:
    pair = models(finished)
    comparison = compared(pair, by_block=True)
    full, elastic = (list(BlockLayout().find(model)) for model in pair)
    blocks = [*full, *elastic]
    watch = Watch(blocks)
    away: list[list[int]] = []

    def look(*_: Any) -> None:
        moved = [any(t.untyped_storage().data_ptr() not in watch.host for t in tensors_of(b)) for b in blocks]
        away.append([number for number, there in enumerate(moved) if there])

    for block in blocks:
        next(iter(block.children())).register_forward_hook(look)
    errors = BlockErrors(full, elastic, comparison.inputs[0].depths)
    batch = batches(1, 6)[0]
    with watch:
        run(comparison, 1, 6)
        with torch.no_grad(), full_precision(comparison.rounded):
            errors.update(comparison.full, batch["input_ids"], batch["labels"] != -100)
    assert watch.found == set()
    assert {len(found) for found in away} == {1}
    assert {number for found in away for number in found} == set(range(len(blocks)))
    look()
    assert away[-1] == []


class _HostParameters(HostTensors):
    """Puts parameters back as they are: within a mode of tensors without data, `data` of one is no tensor of the host."""

    def put_back(self) -> None:
        for module, name, parameter, _ in self._parameters:
            module._parameters[name] = parameter
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_all_that_a_block_computes_with_is_on_the_device(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobiq_lightning.nn.one_block.HostTensors", _HostParameters)
    device = torch.device("lazy:0")  # the one device beside the CPU that needs no driver while tensors have no data
    ids = torch.randint(3, 250, (2, 6))
    pair = models(finished)
    comparison = compared(pair, by_block=False)
    comparison.device = device
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # it refuses operations across devices
        OneBlockAtATime(pair[0], pair[0].model.layers, device)
        elastic_block_by_block(pair[1], pair[1].model.layers, device)
        for _ in range(2):
            for logits, bits in comparison._runs(comparison.first[1:], ids.to(device), 0):
                assert {t.device for t in (logits, *bits)} == {device}
        assert {t.device for block in comparison.elastic.model.layers for t in tensors_of(block)} == {CPU}


def test_validate_of_a_model_that_does_not_fit_finds_the_same_rows_and_leaves_speed_as_it_was(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mobiq_lightning.calibration.comparison_of_run.goes_by_block", lambda *_: True)
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert main(["validate", *finished[1], f"--trainer.default_root_dir={folder}"]) == 0
    assert "Speed is not measured: the model is larger than cpu, and lies on the host." in "".join(capsys.readouterr())
    for name, keys in (("results.json", ["rows", "latency"]), ("diagnostics.json", ["budgets", "block_error"])):
        before, after = (json.loads((run / name).read_text()) for run in (finished[0], folder))
        assert [after[key] for key in keys] == [before[key] for key in keys]


def test_a_device_that_runs_out_of_memory_ends_a_job_with_a_line(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 8 GiB. GPU 0 has 1 GiB free. Of the rest ..."
        )

    monkeypatch.setattr("mobiq_lightning.calibration.module.comparison_of_run", too_much)
    assert main(["validate", *finished[1]]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        "error: CUDA out of memory. Tried to allocate 8 GiB. GPU 0 has 1 GiB free. More is needed than"
    )
    assert said.endswith("the checkpoint is as it was; the same command compares again")
