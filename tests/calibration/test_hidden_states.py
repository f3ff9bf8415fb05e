"""Inputs and targets, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.calibration.hidden_states import HiddenStates
from mobiq_lightning.errors import GuardError, ModelError
from mobiq_lightning.sources import load_source


def reading(block: int, batch: int) -> Any:
    return nullcontext()


@pytest.mark.parametrize("arguments", [{}, {"kind": "qwen2"}, {"dtype": torch.bfloat16}], ids=str)
def test_tables_are_the_hidden_states_of_the_model_itself(
    make_model: Callable[..., Path], arguments: dict[str, Any]
) -> None:
    model = load_source(str(make_model(**arguments))).model
    ids = torch.randint(3, 300, (5, 20))
    with torch.no_grad():
        expected = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    caller = BlockCaller(model, list(model.model.layers), torch.device("cpu"))
    hidden = HiddenStates(caller, ids, {"a": reading}, reading, batch_size=2)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if model.dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(hidden.inputs["a"], expected[0], **tolerance)
    torch.testing.assert_close(hidden.targets, caller.call(0, expected[0]), **tolerance)
    hidden.advance(1)
    torch.testing.assert_close(hidden.inputs["a"], expected[1], **tolerance)
    final = model.model.norm(hidden.targets)  # the model normalises its last hidden state
    torch.testing.assert_close(final, expected[2], **tolerance)


@pytest.mark.parametrize("arguments", [{}, {"tied": False}, {"dtype": torch.bfloat16}], ids=str)
def test_logits_of_the_last_block_are_those_of_the_model_without_calling_blocks(
    make_model: Callable[..., Path], arguments: dict[str, Any]
) -> None:
    model = load_source(str(make_model(**arguments))).model
    ids = torch.randint(3, 300, (1, 20))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    caller = BlockCaller(model, list(model.model.layers), torch.device("cpu"))
    hidden = caller.embed(ids)
    for index in range(2):
        hidden = caller.call(index, hidden)
    calls: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    with caller.after_blocks() as logits_of:
        assert torch.equal(logits_of(ids, hidden), expected)
        assert not torch.equal(logits_of(ids, hidden * -1), expected)
    assert calls == []
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert calls == [1, 1]


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_tables_that_go_through_blocks_in_place_hold_what_each_stream_gives_by_itself(
    make_model: Callable[..., Path], tmp_path: Path, storage: Literal["host", "disk"]
) -> None:
    model = load_source(str(make_model(num_hidden_layers=4))).model
    blocks = list(model.model.layers)
    ids, index = torch.randint(3, 300, (5, 20)), torch.tensor([3, 1])
    caller = BlockCaller(model, blocks, torch.device("cpu"))

    @contextmanager
    def negated(block: int, batch: int) -> Iterator[None]:
        weights = [blocks[block].mlp.up_proj.weight.data, blocks[block].self_attn.v_proj.weight.data]
        for weight in weights:
            weight.neg_()
        yield
        for weight in weights:
            weight.neg_()

    readings = {"a": reading, "b": negated, "c": reading}
    hidden = HiddenStates(caller, ids, readings, reading, 2, storage, tmp_path)
    embedding = caller.embed_all(ids)
    expected = {**dict.fromkeys(readings, embedding), "targets": caller.call(0, embedding)}
    for block in (1, 2, 3):
        hidden.advance(block)
        for name, read in readings.items():
            with torch.no_grad(), read(block - 1, 0):
                expected[name] = caller.call(block - 1, expected[name])
            torch.testing.assert_close(hidden.batch(name, index), expected[name][index])
        with torch.no_grad():
            expected["targets"] = caller.call(block, expected["targets"])
        torch.testing.assert_close(hidden.target_batch(index), expected["targets"][index])
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == (["a.bin", "b.bin", "embedding.bin", "targets.bin"] if storage == "disk" else [])


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_full_inputs_are_what_the_model_itself_gives_whatever_the_streams_make_of_blocks(
    make_model: Callable[..., Path], tmp_path: Path, storage: Literal["host", "disk"]
) -> None:
    model = load_source(str(make_model(num_hidden_layers=4))).model
    ids, index = torch.randint(3, 300, (5, 20)), torch.tensor([3, 1])
    caller = BlockCaller(model, list(model.model.layers), torch.device("cpu"))

    def refused(block: int, batch: int) -> Any:
        raise AssertionError("no stream goes through a block")

    readings = {"2": refused, "routed": refused}
    hidden = HiddenStates(caller, ids, readings, reading, 2, storage, tmp_path, block_inputs="full")
    expected = [caller.embed_all(ids)]
    with torch.no_grad():
        for block in range(4):
            expected.append(caller.call(block, expected[-1]))
    for block in (0, 1, 3):
        hidden.advance(block)
        for name in readings:
            torch.testing.assert_close(hidden.batch(name, index), expected[block][index])
        torch.testing.assert_close(hidden.target_batch(index), expected[block + 1][index])


def test_streams_see_their_own_reading_of_the_blocks_before(make_model: Callable[..., Path]) -> None:
    model = load_source(str(make_model())).model
    seen: list[tuple[str, int, int]] = []

    def noting(name: str) -> Any:
        return lambda block, batch: seen.append((name, block, batch)) or nullcontext()

    caller = BlockCaller(model, list(model.model.layers), torch.device("cpu"))
    hidden = HiddenStates(caller, torch.randint(3, 300, (4, 8)), {"a": noting("a")}, noting("full"), batch_size=2)
    hidden.advance(1)
    assert seen == [("full", 0, 0), ("full", 0, 1), ("a", 0, 0), ("a", 0, 1), ("full", 1, 0), ("full", 1, 1)]


def test_a_block_tried_again_runs_in_float32_and_goes_back_to_its_dtype(make_model: Callable[..., Path]) -> None:
    model = load_source(str(make_model(dtype=torch.bfloat16))).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    caller = BlockCaller(model, list(model.model.layers), torch.device("cpu"), float32_blocks={1})
    hidden = caller.embed_all(torch.randint(3, 300, (2, 8)))
    assert caller.call(0, hidden).dtype == torch.bfloat16
    assert caller.call(1, hidden).dtype == torch.float32
    caller.release()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)


def overflowing(make_model: Callable[..., Path], dtype: torch.dtype, block: int) -> BlockCaller:
    """A model whose block gives numbers that float16 cannot hold."""
    model = load_source(str(make_model(dtype=dtype))).model
    model.model.layers[block].self_attn.o_proj.weight.data.mul_(3e4)
    return BlockCaller(model, list(model.model.layers), torch.device("cpu"))


@pytest.mark.parametrize("block", [0, 1])
def test_targets_that_overflow_float16_are_refused_with_layer_size_and_dtype(
    make_model: Callable[..., Path], block: int
) -> None:
    ids = torch.randint(3, 300, (4, 8), generator=torch.Generator().manual_seed(0))
    said = (
        rf"block {block + 1}/2 gives \d+ of 512 numbers .*self_attn\.o_proj was given .* float16.*model\.dtype bfloat16"
    )

    def advance(dtype: torch.dtype) -> None:
        HiddenStates(overflowing(make_model, dtype, block), ids, {"2": reading}, reading, batch_size=2).advance(1)

    with pytest.raises(ModelError, match=said):
        advance(torch.float16)
    advance(torch.float32)


def test_inputs_that_calibrated_blocks_make_infinite_are_no_matter_of_the_model(
    make_model: Callable[..., Path],
) -> None:
    model = load_source(str(make_model())).model
    caller = BlockCaller(model, list(model.model.layers), torch.device("cpu"))

    @contextmanager
    def ruined(block: int, batch: int) -> Iterator[None]:
        weight = model.model.layers[block].mlp.up_proj.weight
        before = weight.detach().clone()
        weight.data[0] = torch.inf
        yield
        weight.data.copy_(before)

    hidden = HiddenStates(caller, torch.randint(3, 300, (4, 8)), {"2": ruined}, reading, batch_size=2)
    with pytest.raises(GuardError, match=r"block 1/2 read at 2 bits gives .* mlp\.up_proj was given .*Set worse_block"):
        hidden.advance(1)


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.bfloat16), ("cpu", torch.float32)])
def test_a_block_that_was_on_a_device_has_the_very_tensors_of_the_host_again(
    make_model: Callable[..., Path], device: str, dtype: torch.dtype
) -> None:
    model = load_source(str(make_model(dtype=torch.bfloat16))).model
    block = model.model.layers[1]
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in block.state_dict(keep_vars=True).items()}
    values = {name: tensor.detach().clone() for name, (tensor, _) in before.items()}
    caller = BlockCaller(model, list(model.model.layers), torch.device(device), {1} if dtype == torch.float32 else ())
    for after in (caller.release, lambda: caller.bring(0)):
        caller.bring(1)
        assert {(t.device.type, t.dtype) for t in block.parameters()} == {(device, dtype)}
        after()
        now = block.state_dict(keep_vars=True)
        assert now.keys() == before.keys()
        for name, (tensor, address) in before.items():
            assert now[name] is tensor
            assert (tensor.data_ptr(), tensor.dtype) == (address, torch.bfloat16)
            assert torch.equal(tensor, values[name])
