"""Experts taken apart into linears compute what they did, are read at depths decided once for all, and count what is read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mobiq_lightning.errors import ModelError
from mobiq_lightning.nn import (
    BlockLayout,
    CalibratedBlock,
    RoutedExperts,
    fixed_depth,
    full_precision,
    meet_budget,
    record_gates,
)
from mobiq_lightning.strategies import LinearRouter, ResidualSlices

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, tuple[str, dict[str, int]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 3, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12,
            "num_experts_per_tok": 2,
        },
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 2},
    ),
}  # fmt: skip
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


def make(kind: str) -> Any:
    import transformers

    name, extra = EXPERTS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, name)(**{**SMALL, **extra})
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def sliced(model: Any) -> list[CalibratedBlock]:
    layout = BlockLayout()
    layout.open(model)
    slices, router = partial(ResidualSlices, slice_bits=[2, 2, 4], group_size=8), LinearRouter
    return [CalibratedBlock(b, layout.group_linears(b, "input"), slices, router) for b in layout.find(model)]


@pytest.mark.parametrize("kind", EXPERTS)
def test_opened_experts_compute_what_they_did(kind: str) -> None:
    model = make(kind)
    before = logits(model)
    n_weights = sum(p.numel() for p in model.parameters())
    BlockLayout().open(model)
    assert any(isinstance(module, RoutedExperts) for module in model.modules())
    assert sum(p.numel() for p in model.parameters()) == n_weights
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    BlockLayout().open(model)  # once more changes nothing
    torch.testing.assert_close(logits(pickle.loads(pickle.dumps(model))), logits(model))
    torch.testing.assert_close(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("kind", EXPERTS)
def test_one_input_routes_all_experts_of_a_block_and_full_precision_is_as_before(kind: str) -> None:
    model = make(kind)
    before = logits(model)
    blocks = sliced(model)
    inputs = [routed for block in blocks for routed in block.routed_inputs()]
    with full_precision(inputs):
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    for block in blocks:
        of_experts = [linears for _, linears in block.readers if len(linears) >= 6]
        assert len(of_experts) == (0 if kind == "llama4" and block is blocks[0] else 1)
    gating = ("gate", "router", "shared_expert_gate")
    assert not any(name.rpartition("-")[2] in gating for block in blocks for name in block.schemes)
    with fixed_depth(inputs, 8):
        error = (logits(model) - before).norm() / before.norm()
    assert error < 0.3


@pytest.mark.parametrize("kind", EXPERTS)
def test_each_token_is_decided_once_and_reads_what_it_was_decided(kind: str) -> None:
    model = make(kind)
    blocks = sliced(model)
    inputs = [routed for block in blocks for routed in block.routed_inputs()]
    with meet_budget(inputs, 4.0), record_gates(inputs) as records:
        logits(model)
    assert all(len(record) == 1 and record[0].numel() == IDS.numel() for record in records)
    for routed in inputs:
        routed.router.threshold.fill_(torch.inf)
    lowest = logits(model)
    with fixed_depth(inputs, 2):
        torch.testing.assert_close(logits(model), lowest, atol=1e-4, rtol=1e-3)


def test_gradients_reach_the_router_and_the_experts_that_were_asked() -> None:
    model = make("mixtral")
    blocks = sliced(model)
    inputs = [routed for block in blocks for routed in block.routed_inputs()]
    with meet_budget(inputs, 4.0):
        model(input_ids=IDS[:1, :1], use_cache=False).logits.sum().backward()
    for block in blocks:
        assert all(p.grad is not None for router in block.routers() for p in router.parameters())
        experts = [name for name in block.schemes if "experts" in name]
        asked = [name for name in experts if any(p.grad is not None for p in block.schemes[name].parameters())]
        assert len(asked) == 4  # two linears of two experts of three
        assert len(experts) == 6


def test_weights_of_an_input_are_those_that_a_token_reads() -> None:
    model = make("mixtral")
    block = sliced(model)[0]
    of_experts = next(routed for routed, linears in block.readers if len(linears) == 6)
    assert of_experts.n_weights == 2 * 3 * 16 * 24  # experts that a token goes to, three matrices each


def test_the_owner_of_experts_may_leave_them_in_full_precision() -> None:
    model, layout = make("mixtral"), BlockLayout(experts=False)
    layout.open(model)
    block = layout.find(model)[0]
    assert not any(isinstance(module, RoutedExperts) for module in model.modules())
    assert set(layout.kept(block)) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"}
    assert "experts" not in layout.to_stored(model)


def test_stacks_of_matrices_of_a_form_that_is_not_known_are_refused() -> None:
    model = make("llama4")

    class Others(type(model.model.layers[1].feed_forward.experts)):  # type: ignore[misc]
        """Experts of a class that nobody knows."""

    model.model.layers[1].feed_forward.experts.__class__ = Others
    with pytest.raises(ModelError, match=r"Llama4ForCausalLM holds \d+% of the weights of block 2 .*experts\.gate_up"):
        BlockLayout().open(model)


def test_experts_that_give_something_else_once_opened_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoutedExperts, "_gated", lambda self, y: y[:, : y.shape[1] // 2])
    with pytest.raises(ModelError, match=r"MixtralExperts at mlp\.experts: taken apart .* differ by up to \d"):
        BlockLayout().open(make("mixtral"))


def test_blocks_are_found_where_the_model_itself_says(make_model: Callable[..., Path]) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = {name: value for name, value in SMALL.items() if name != "head_dim"}
    model, layout = GPTNeoXForCausalLM(GPTNeoXConfig(**config)), BlockLayout()
    layout.open(model)
    assert layout.blocks == "gpt_neox.layers"
    with pytest.raises(ModelError, match=r"no list of decoder blocks at 'model\.blocks'.*gpt_neox\.layers"):
        BlockLayout(blocks="model.blocks").open(model)
