"""Blocks are called with what the model passes to each of them, and models for which that is not all are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.calibration.block_check import check_blocks
from mobiq_lightning.calibration.planning.random_model import blocks_of_each_kind, random_model
from mobiq_lightning.errors import ModelError
from mobiq_lightning.nn import BlockLayout
from mobiq_lightning.sources import load_source

CPU = torch.device("cpu")
AT_LAYERS = BlockLayout(blocks="layers")
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
"""Block 1 attends to all tokens before, block 2 to the last four."""


def logits_by_blocks(model: Any, ids: Tensor) -> tuple[Tensor, BlockCaller]:
    caller = BlockCaller(model, list(model.model.layers), CPU)
    hidden = caller.embed_all(ids)
    for index in range(len(model.model.layers)):
        hidden = caller.call(index, hidden)
    with caller.after_blocks() as logits_of:
        return logits_of(ids, hidden), caller


def test_each_block_is_called_with_its_own_mask(make_model: Callable[..., Path]) -> None:
    model = load_source(str(make_model(kind="qwen2", **WINDOW))).model
    ids = torch.randint(3, 300, (3, 20))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    found, caller = logits_by_blocks(model, ids)
    torch.testing.assert_close(found, expected)
    caller.caught.calls[1] = caller.caught.calls[0]  # as if the first block's were every block's
    hidden = caller.call(1, caller.call(0, caller.embed_all(ids)))
    with caller.after_blocks() as logits_of:
        assert (logits_of(ids, hidden) - expected).abs().max() > 0.1


def test_equal_tensors_of_all_blocks_are_kept_once(make_model: Callable[..., Path]) -> None:
    model = load_source(str(make_model())).model
    _, caller = logits_by_blocks(model, torch.randint(3, 300, (1, 20)))
    one, other = (keywords["position_embeddings"] for _, keywords in caller.caught.calls)
    assert one[0] is other[0]
    assert one[1] is other[1]


def test_other_lengths_are_caught_anew(make_model: Callable[..., Path]) -> None:
    model = load_source(str(make_model(kind="qwen2", **WINDOW))).model
    caller = BlockCaller(model, list(model.model.layers), CPU)
    for length in (12, 20):
        ids = torch.randint(3, 300, (2, length))
        hidden = caller.call(1, caller.call(0, caller.embed(ids)))
        with torch.no_grad():
            expected = model.model(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.model.norm(hidden), expected)


def test_catching_computes_no_block_and_leaves_the_model_as_it_was(make_model: Callable[..., Path]) -> None:
    model = load_source(str(make_model())).model
    calls: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    BlockCaller(model, list(model.model.layers), CPU).embed_all(torch.randint(3, 300, (2, 20)))
    assert calls == []
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_numbers_keep_the_dtype_that_the_model_has_them_in() -> None:
    from transformers import Olmo2Config

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "pad_token_id": None,
    }
    model = random_model(Olmo2Config(**sizes, dtype="bfloat16"), [0, 1], CPU)
    model.model.layers[0].mlp.extra = nn.Parameter(
        torch.ones(3), requires_grad=False
    )  # as corrections of experts' scores are
    ids = torch.randint(50, (2, 20))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    found, caller = logits_by_blocks(model, ids)
    assert torch.equal(found, expected)
    assert (
        caller.caught.calls[0][1]["position_embeddings"][0].dtype == torch.float32
    )  # a cosine rounded is another rotation
    assert model.model.layers[0].mlp.extra.dtype == torch.float32
    again = BlockCaller(model, list(model.model.layers), CPU, float32_blocks={0})
    again.call(0, again.embed_all(ids))
    again.release()
    assert model.model.layers[0].mlp.extra.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_a_call_before_anything_was_embedded_says_so(make_model: Callable[..., Path]) -> None:
    model = load_source(str(make_model())).model
    with pytest.raises(RuntimeError, match="call embed first"):
        BlockCaller(model, list(model.model.layers), CPU).call(0, torch.zeros(1, 4, 32))


class Block(nn.Module):
    """A block that returns a tuple, as those of older models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, beside: Tensor, *, shared: dict[str, Tensor]) -> tuple[Tensor]:
        seen = shared.setdefault("first", hidden_states)
        return (hidden_states + self.linear(seen * beside),)


class Toy(nn.Module):
    """A language model with blocks that take more than hidden states.

    Args:
        beside: Makes the second argument of blocks from embeddings (B, T, H).
        between: What is done to hidden states between blocks.
        shares: Whether blocks read what the first one was given.
        n_blocks: Blocks.
    """

    def __init__(
        self, beside: Any = torch.ones_like, between: Any = None, shares: bool = False, n_blocks: int = 2
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.layers = nn.ModuleList([Block() for _ in range(n_blocks)])
        self.beside, self.between, self.shares = beside, between, shares

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(input_ids)
        beside, shared = self.beside(hidden), {}
        for layer in self.layers:
            hidden = layer(hidden, beside, shared=shared if self.shares else {})[0]
            hidden = hidden if self.between is None else self.between(hidden)

        class Output:
            logits = self.head(hidden)

        return Output


def test_blocks_that_return_tuples_and_take_positional_arguments_are_called_as_the_model_does() -> None:
    model = Toy()
    check_blocks(model, list(model.layers), AT_LAYERS)
    single = Toy(n_blocks=1)
    check_blocks(single, list(single.layers), AT_LAYERS)
    caller = BlockCaller(model, list(model.layers), CPU)
    caller.embed(torch.tensor([[1, 2, 3]]))
    assert caller.caught.gives_tuple
    assert [len(args) for args, _ in caller.caught.calls] == [1, 1]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Toy(beside=torch.sin), r"Toy passes beside to block 1/2, which depends on the tokens"),
        (Toy(between=torch.sin), r"Toy changes hidden states between block 1 and block 2 of 2"),
        (Toy(beside=lambda hidden: torch.full((1,), 1.0 * len(hidden))), r"blocks of Toy give logits that differ by"),
        (Toy(shares=True), r"blocks of Toy give logits that differ by up to \d.* \(which reach \d.*not supported"),
    ],
    ids=["tokens", "between", "rows", "shared"],
)
def test_a_model_whose_blocks_need_more_than_hidden_states_is_refused(model: Toy, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        check_blocks(model, list(model.layers), AT_LAYERS)


def test_a_linear_whose_weight_a_block_multiplies_with_itself_is_refused_by_name() -> None:
    model = Toy()
    layer = model.layers[1]
    layer.hidden_from_us = nn.Linear(8, 8)
    layer.linear.register_forward_hook(lambda _, args, output: output + args[0] @ layer.hidden_from_us.weight)
    with pytest.raises(ModelError, match=r"blocks of Toy never call hidden_from_us, so that"):
        check_blocks(model, list(model.layers), AT_LAYERS)


def test_the_check_runs_the_first_and_last_block_of_each_kind_alone(make_model: Callable[..., Path]) -> None:
    config = load_source(str(make_model(kind="qwen2", **WINDOW))).model.config
    config.layer_types = ["full_attention", "sliding_attention"] * 3
    model = random_model(config, [0, 1, 2, 3, 4, 5], CPU)
    runs = dict.fromkeys(range(6), 0)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: runs.update({index: runs[index] + 1}))
    check_blocks(model, list(model.model.layers), BlockLayout())
    assert runs == {0: 2, 1: 2, 2: 0, 3: 0, 4: 2, 5: 2}


def test_a_random_model_has_a_block_of_each_kind(make_model: Callable[..., Path]) -> None:
    config = load_source(str(make_model(kind="qwen2"))).model.config
    assert blocks_of_each_kind(config) == [0, 1]
    config.num_hidden_layers, config.layer_types = 5, ["full_attention"] * 3 + ["sliding_attention"] * 2
    assert blocks_of_each_kind(config) == [0, 3]
    made = random_model(config, [0, 3], CPU)
    assert made.config.layer_types == ["full_attention", "sliding_attention"]
    assert len(made.model.layers) == 2
    assert config.num_hidden_layers == 5
