"""Training checkpoints whose parts at rest are written once."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mobiq_lightning.calibration import SafeCheckpointIO, can_be_read, checkpoint_parts
from mobiq_lightning.runs import TrainingCheckpoints


class Training:
    """Two blocks, one of which is at rest, and the optimizer's averages of both."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.io = folder, SafeCheckpointIO()
        self.weights = [torch.arange(6.0), torch.zeros(3)]
        self.averages = [torch.ones(6), torch.ones(3)]
        self.bits = [2, 3]
        self.at_rest: dict[str, Any] = {"000000-schemes": {"prefix": "blocks.0.schemes.", "optimizer": [0]}}

    def save(self, epoch: int) -> Path:
        path = self.folder / f"epoch-{epoch:06d}.ckpt"
        checkpoint = {
            "epoch": epoch,
            "state_dict": {
                "blocks.0.schemes._extra_state": torch.tensor(self.bits),  # made anew for each, as modules do
                **{f"blocks.{n}.schemes.weight": weight for n, weight in enumerate(self.weights)},
            },
            "optimizer_states": [
                {
                    "state": {n: {"average": a} for n, a in enumerate(self.averages)},
                    "param_groups": [{"params": [0, 1]}],
                }
            ],
            "at_rest": self.at_rest,
        }
        self.io.save_checkpoint(checkpoint, path)
        assert [len(checkpoint[key]) for key in ("state_dict", "at_rest")] == [3, len(self.at_rest)]
        return path

    def parts(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.folder.glob("*.part")}

    def check(self, path: Path) -> None:
        found = SafeCheckpointIO().load_checkpoint(path)
        assert found.keys() == {"epoch", "state_dict", "optimizer_states"}
        assert found["state_dict"]["blocks.0.schemes._extra_state"].tolist() == self.bits
        for n, (weight, average) in enumerate(zip(self.weights, self.averages, strict=True)):
            assert torch.equal(found["state_dict"][f"blocks.{n}.schemes.weight"], weight)
            assert torch.equal(found["optimizer_states"][0]["state"][n]["average"], average)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def test_what_is_at_rest_is_written_once_and_every_checkpoint_is_whole_with_it(training: Training) -> None:
    first = training.save(0)
    written = training.parts()
    assert len(written) == 1
    training.check(first)
    training.weights[1] += 1
    second = training.save(1)
    assert training.parts() == written
    training.check(second)
    names = [path.with_suffix(".sha256").read_text().split()[1:] for path in (first, second)]
    assert names == [[*written], [*written]]


def test_a_resumed_run_goes_on_with_the_files_that_hold_what_it_was_given(training: Training) -> None:
    path = training.save(0)
    written = training.parts()
    training.io = SafeCheckpointIO()
    training.io.load_checkpoint(path)
    training.weights[0] = training.weights[0].clone()
    training.save(1)
    assert training.parts() == written
    training.io = SafeCheckpointIO()
    training.io.load_checkpoint(path)
    training.weights[0] = training.weights[0] + 1
    training.check(training.save(2))
    assert len(training.parts()) == 2


def test_extra_state_is_compared_by_its_numbers_as_modules_make_it_anew(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = checkpoint_parts._write
    monkeypatch.setattr(checkpoint_parts, "_write", lambda name, *rest: written.append(name) or write(name, *rest))
    kept = [training.save(epoch) for epoch in range(3)]
    assert written == ["000000-schemes"]
    training.bits = [3, 4]
    training.check(training.save(len(kept)))
    assert written == ["000000-schemes"] * 2


@pytest.mark.parametrize("kind", ["weights", "averages"])
def test_what_was_written_to_is_saved_again_and_its_former_file_goes_with_the_last_that_names_it(
    training: Training, kind: str
) -> None:
    first, second = training.save(0), training.save(1)
    former = set(training.parts())
    getattr(training, kind)[0].add_(1)
    third = training.save(2)
    assert len(training.parts()) == 2
    training.check(third)
    training.io.remove_checkpoint(first)
    assert former < set(training.parts())
    training.io.remove_checkpoint(second)
    assert len(training.parts()) == 1
    assert not former & set(training.parts())
    training.check(third)


def test_what_was_in_training_meanwhile_is_saved_again_even_if_nobody_counts_the_writing(training: Training) -> None:
    training.save(0)
    resting, training.at_rest = training.at_rest, {}
    training.weights[0].data.copy_(torch.zeros(6))
    training.save(1)
    training.at_rest = resting
    training.check(training.save(2))


def test_a_damaged_or_missing_part_leads_to_the_checkpoint_before(training: Training, tmp_path: Path) -> None:
    before = training.save(0)
    training.weights[0].add_(1)
    last = training.save(1)
    kept = TrainingCheckpoints(tmp_path)
    assert kept.newest(can_be_read) == (last, [])
    part = tmp_path / last.with_suffix(".sha256").read_text().split()[1]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 0xFF
    part.write_bytes(data)
    assert kept.newest(can_be_read) == (before, [last])
    part.unlink()
    assert kept.newest(can_be_read) == (before, [last])
    other = tmp_path / f"block-000000-schemes-{'0' * 64}.part"
    other.mkdir()  # nothing of ours
    kept.drop_after(1)
    assert other.is_dir()
    assert list(tmp_path.glob("epoch-*.ckpt")) == [before]
    training.weights[0].sub_(1)
    training.check(before)


def test_a_checkpoint_that_names_another_file_as_its_part_is_not_read(training: Training, tmp_path: Path) -> None:
    path = training.save(0)
    for name in ("../mine.part", "mine.ckpt", 3):
        torch.save({"state_dict": {}, "parts": [name]}, path)
        assert not can_be_read(path)


class Learned(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)
        self.inner.register_buffer("codes", torch.arange(128, dtype=torch.uint8))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs a list of what is mapped, as Linux has it")
class TestMapping:
    """What was written leaves the memory of the process."""

    @pytest.fixture
    def learned(self, monkeypatch: pytest.MonkeyPatch) -> tuple[Learned, torch.optim.Optimizer]:
        monkeypatch.setattr(checkpoint_parts, "MAPPED_FROM", 64)
        module = Learned()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        step(module, optimizer)
        return module, optimizer

    def test_large_tensors_of_what_was_written_are_those_of_its_file(
        self, learned: tuple[Learned, torch.optim.Optimizer], tmp_path: Path
    ) -> None:
        module, optimizer = learned
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        save(module, optimizer, tmp_path)
        assert {name for name, tensor in module.state_dict().items() if from_file(tensor)} == {
            "inner.weight",
            "inner.codes",
        }
        assert from_file(optimizer.state[module.inner.weight]["exp_avg"])
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        (written,) = [(path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("*.part")]
        save(module, optimizer, tmp_path)
        assert [(path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("*.part")] == [written]

    def test_training_goes_on_with_them_and_does_not_reach_the_file(
        self, learned: tuple[Learned, torch.optim.Optimizer], tmp_path: Path
    ) -> None:
        module, optimizer = learned
        other = copy.deepcopy(module)
        of_other = torch.optim.AdamW(other.parameters(), lr=0.1)
        of_other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        save(module, optimizer, tmp_path)
        (file,) = tmp_path.glob("*.part")
        bytes_of_file = file.read_bytes()
        for each, its_optimizer in ((module, optimizer), (other, of_other)):
            step(each, its_optimizer)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
        assert file.read_bytes() == bytes_of_file
        save(module, optimizer, tmp_path)
        assert len(list(tmp_path.glob("*.part"))) == 2


def step(module: Learned, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module.inner(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()


def save(module: Learned, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """As a calibration does whose one block is at rest; all saves of a test have one writer, which knows what it wrote."""
    writer = WRITERS.setdefault(folder, SafeCheckpointIO())
    state = optimizer.state_dict()
    averages = {number: optimizer.state[p] for number, p in enumerate(module.parameters())}
    described = {
        "prefix": "blocks.0.schemes.",
        "optimizer": [*averages],
        "replace": partial(checkpoint_parts.map_tensors, module, "blocks.0.schemes.", averages),
    }
    checkpoint = {
        "state_dict": module.state_dict(prefix="blocks.0.schemes."),
        "optimizer_states": [state],
        "at_rest": {"000000-schemes": described},
    }
    writer.save_checkpoint(checkpoint, folder / f"epoch-{len(list(folder.glob('*.ckpt'))):06d}.ckpt")


WRITERS: dict[Path, SafeCheckpointIO] = {}


def from_file(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a mapped part."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        first, last = (int(address, 16) for address in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.endswith(".part")
    return False
