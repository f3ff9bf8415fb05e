"""A whole model on the kernels: the same texts and counts as on the reference, one captured step for all precisions."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mobiq_lightning
from mobiq_lightning.errors import KernelError
from mobiq_lightning.nn import ElasticLinear, KeptWeights, fixed_depth, record_gates
from mobiq_lightning.runtime import GraphedStep
from mobiq_lightning.runtime.fused_blocks import FusedMLP, FusedNorm
from mobiq_lightning.runtime.kernel_input import fusable_router
from mobiq_lightning.strategies import MLPRouter, RandomRouter, StaticRouter

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
PROMPT = {"input_ids": torch.tensor([[0, 5, 9, 33, 4], [7, 8, 120, 10, 11]])}
MASKED = {**PROMPT, "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])}
SHORT = {"input_ids": PROMPT["input_ids"][:, :2]}  # the interpreter's time grows with the tokens
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def both(finished: tuple[Path, list[str]]) -> tuple[Any, Any]:
    """The same checkpoint on the kernels, and on the reference."""
    where: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16} if GPU else {}
    ours, theirs = mobiq_lightning.load(finished[0], **where), mobiq_lightning.load(finished[0], **where)
    spread_scores(ours)
    spread_scores(theirs)
    ours.switch_kernels()
    theirs.switch_kernels(False)
    return ours, theirs


def spread_scores(model: Any) -> None:
    """Tokens of a model calibrated for seconds differ little; let them."""
    for module in model.modules():
        if isinstance(module, MLPRouter):
            with torch.no_grad():
                module.score.weight.mul_(20)


def on(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(model.device) for name, value in inputs.items()}


def static(model: Any) -> dict[str, Any]:
    """Settings of a generation with a static cache, which on a CPU must be asked to be compiled."""
    from transformers import CompileConfig

    config = CompileConfig()
    config._compile_all_devices = True
    return {"cache_implementation": "static", **({} if model.device.type == "cuda" else {"compile_config": config})}


def test_a_model_on_the_kernels_says_so_and_why_if_it_is_not(both: tuple[Any, Any]) -> None:
    assert both[0].path == "kernels"
    assert both[1].path == "reference: switched off"


@pytest.mark.skipif(GPU, reason="says why there is none")
def test_without_a_gpu_the_reason_is_named(finished: tuple[Path, list[str]]) -> None:
    assert mobiq_lightning.load(finished[0]).path == "reference: they need a CUDA device, the model is on cpu"


@pytest.mark.parametrize("bits", [2.0, 3.2, 8.0])
def test_logits_and_counts_agree_with_the_reference(both: tuple[Any, Any], bits: float) -> None:
    logits, used = [], []
    for model in both:
        with torch.no_grad(), model.bits(bits):
            logits.append(model(**on(model, MASKED)).logits)
        used.append(model.bits_used(per_layer=True))
    torch.testing.assert_close(*logits, atol=1e-1 if GPU else 2e-4, rtol=1e-2)
    assert used[0].n_tokens == used[1].n_tokens == 9
    if not GPU:
        assert used[0] == used[1]
        assert bits in (2.0, 8.0) or len(set(used[0].per_layer.values())) > 2, "the test needs tokens of several depths"


@pytest.mark.skipif(GPU, reason="rounding may turn a token")
def test_a_captured_step_makes_the_same_tokens_as_the_reference(both: tuple[Any, Any]) -> None:
    bits = [2.0, 4.0]
    wanted = both[1].generate(**MASKED, **GREEDY, bits=bits)
    used = both[1].bits_used()
    for model in both:
        assert torch.equal(model.generate(**MASKED, **GREEDY, **static(model), bits=bits), wanted)
        assert model.bits_used() == used


def test_one_captured_step_serves_all_precisions(both: tuple[Any, Any]) -> None:
    from transformers import LogitsProcessor, LogitsProcessorList

    model, reference = both
    steps: list[GraphedStep] = []
    wanted = [2.0, 8.0, 3.5, 2.5, 5.0]

    class Turn(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, turned: Any) -> None:
            self.turned = turned

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            self.turned.set_bits(wanted[ids.shape[1] % len(wanted)])
            return scores

    made = model.get_compiled_call
    model.get_compiled_call = lambda config: steps.append(made(config)) or steps[-1]
    try:
        settings = {
            **GREEDY,
            "bits": 3.0,
        }  # the three steps after the prompt are of three precisions, none of them this
        processors = [LogitsProcessorList([Turn(m)]) for m in both]
        turned = model.generate(**on(model, PROMPT), **settings, **static(model), logits_processor=processors[0])
        plain = reference.generate(**on(model, PROMPT), **settings, logits_processor=processors[1])
    finally:
        del model.get_compiled_call
    assert [step.captures for step in steps] == [1]
    assert GPU or torch.equal(turned, plain)


def test_a_step_starts_anew_when_the_dial_replaces_what_it_captured(both: tuple[Any, Any]) -> None:
    model = both[0]
    step, cache = GraphedStep(model), object()
    shown = []
    step.model = lambda **inputs: shown.append(inputs["input_ids"]) or inputs["input_ids"]  # type: ignore[func-returns-value]
    step.model.dial = model.dial  # type: ignore[attr-defined]
    step.model.parameters = lambda: iter([torch.zeros(1)])  # type: ignore[attr-defined]
    inputs = [torch.full((2, 1), n) for n in range(6)]
    for value in inputs[:3]:
        step(input_ids=value, past_key_values=cache)
    assert step.captures == 1
    assert shown[1] is shown[2], "captured steps read where the first inputs were copied to"
    model.set_bits([2.0, 4.0])
    step(input_ids=inputs[3], past_key_values=cache)
    step(input_ids=inputs[4], past_key_values=cache)
    assert step.captures == 2
    model.set_bits(4.0)


def test_fixed_depths_and_recorded_gates_go_through_the_kernels_too(both: tuple[Any, Any]) -> None:
    results, records = [], []
    for model in both:
        with torch.no_grad(), fixed_depth(model.dial.inputs, 3):
            results.append(model(**on(model, PROMPT)).logits)
        with torch.no_grad(), model.bits(3.2), record_gates(model.dial.inputs) as gates:
            model(**on(model, PROMPT))
        records.append([input_gates[0] for input_gates in gates])
    torch.testing.assert_close(*results, atol=1e-1 if GPU else 2e-4, rtol=1e-2)
    assert GPU or all(torch.equal(a, b) for a, b in zip(*records, strict=True))


def test_norms_and_mlps_of_llama_blocks_enter_the_kernels(both: tuple[Any, Any]) -> None:
    model = both[0]
    fused = [type(m).__mro__[1] for m in model.modules() if isinstance(m, (FusedNorm, FusedMLP))]
    blocks = model.config.num_hidden_layers
    assert fused.count(FusedNorm) == 2 * blocks
    assert fused.count(FusedMLP) == blocks
    launches = []
    entered = {routed: routed.kernel.enter for routed in model.dial.inputs}
    for routed, enter in entered.items():
        routed.kernel.enter = lambda *a, _enter=enter, **k: launches.append(1) or _enter(*a, **k)
    with torch.no_grad(), model.bits(3.0):
        model(**on(model, SHORT))
    for routed in entered:
        del routed.kernel.enter
    assert len(launches) == 3 * blocks


def test_planes_come_back_when_the_model_is_saved_moved_or_copied(both: tuple[Any, Any], tmp_path: Path) -> None:
    ours, theirs = both
    mine, wanted = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    ours.save_pretrained(tmp_path)
    again = mobiq_lightning.load(tmp_path, device=ours.device)
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    ours.to(ours.device)
    assert all(isinstance(m.plane_0, Tensor) for m in ours.modules() if isinstance(m, ElasticLinear))
    assert ours.path == "kernels", "they are found again before the next forward pass"
    clones = (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)))
    assert [clone.path for clone in clones] == ["kernels", "kernels"]
    with torch.no_grad():
        copied, pickled, own = (model(**on(ours, SHORT)).logits for model in (*clones, ours))
    assert torch.equal(copied, own)
    assert torch.equal(pickled, own)


def test_the_kernels_refuse_to_give_gradients(both: tuple[Any, Any]) -> None:
    model = both[0]
    embedded = model.get_input_embeddings()(on(model, PROMPT)["input_ids"]).requires_grad_()
    with pytest.raises(KernelError, match="no_grad"):
        model(inputs_embeds=embedded)


@pytest.mark.skipif(GPU, reason="they can be used there")
def test_kernels_that_cannot_run_are_refused_with_the_reason(finished: tuple[Path, list[str]]) -> None:
    model = mobiq_lightning.load(finished[0], dtype=torch.float64)
    with pytest.raises(KernelError, match="float64"):
        model.switch_kernels()


def test_compiled_models_go_through_one_operator(both: tuple[Any, Any]) -> None:
    model = both[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), model.bits(3.2):
        wanted = model(**on(model, SHORT), use_cache=False).logits
    with torch.no_grad(), model.bits(3.2):
        found = compiled(**on(model, SHORT), use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-1 if GPU else 2e-4, rtol=1e-2)
    torch._dynamo.reset()


def test_only_routers_that_are_what_they_say_are_run_by_the_kernels() -> None:
    class Other(MLPRouter):
        def scores(self, x: Tensor) -> Tensor:
            return super().scores(x) + 1

    class Renamed(MLPRouter):
        pass

    assert fusable_router(MLPRouter(8, 3)) is not None
    assert fusable_router(Renamed(8, 3)) is not None
    assert [fusable_router(kind(8, 3)) for kind in (Other, StaticRouter, RandomRouter)] == [None] * 3


class TestKeptWeights:
    def make(self, limit: int, per_pass: int) -> tuple[KeptWeights, list[Any]]:
        kept, made = KeptWeights(limit, per_pass), []
        self.get = lambda key: kept.get(key, lambda: made.append(key) or torch.zeros(25))  # 100 bytes
        return kept, made

    def test_each_is_made_once(self) -> None:
        kept, made = self.make(1000, 3)
        for _ in range(4):
            for key in "abc":
                self.get(key)
        assert made == list("abc")
        assert kept.n_bytes == 300

    def test_the_limit_holds_and_those_within_it_stay(self) -> None:
        kept, made = self.make(200, 3)
        for _ in range(3):
            for key in "abc":
                self.get(key)
        assert made == list("abccc")
        assert kept.n_bytes == 200

    def test_what_nobody_asks_for_any_more_makes_room(self) -> None:
        kept, made = self.make(300, 3)
        for key in "abc" + "def" * 3:
            self.get(key)
        assert made == list("abcdefd"), "d came before a whole pass without a, and was made again once"
        assert kept.n_bytes == 300

    def test_a_model_unpacks_each_weight_once(self, finished: tuple[Path, list[str]], monkeypatch: Any) -> None:
        from mobiq_lightning.packing import PackedSlices

        model = mobiq_lightning.load(finished[0], bits=2.0)
        calls = []
        unpack = PackedSlices.weight_at
        monkeypatch.setattr(PackedSlices, "weight_at", lambda *a: calls.append(a) or unpack(*a))
        linears = [m for m in model.modules() if isinstance(m, ElasticLinear)]
        with torch.no_grad():
            first, second = model(**PROMPT).logits, model(**PROMPT).logits
            assert torch.equal(first, second)
            assert len(calls) == len(linears)
            assert model.kept.n_bytes == sum(4 * linear.n_weights for linear in linears)
            model.keep_weights(0)
            assert torch.equal(model(**PROMPT).logits, first)
        assert len(calls) == 2 * len(linears)
        assert model.kept.n_bytes == 0

    def test_weights_that_are_replaced_are_not_kept(self, finished: tuple[Path, list[str]]) -> None:
        model = mobiq_lightning.load(finished[0], bits=2.0)
        with torch.no_grad():
            before = model(**PROMPT).logits
            state = {k: torch.zeros_like(v) if k.endswith("plane_0") else v for k, v in model.state_dict().items()}
            nn.Module.load_state_dict(model, state)
            assert not torch.equal(model(**PROMPT).logits, before)
