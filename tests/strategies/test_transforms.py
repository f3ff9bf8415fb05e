"""Transforms before slicing: the contract of every class, and what each is for."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mobiq_lightning.calibration import initialize_transforms
from mobiq_lightning.calibration.apply_transform import fold_into_source
from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.calibration.hidden_states import HiddenStates
from mobiq_lightning.checkpoint.quantizer import build_transform
from mobiq_lightning.errors import ModelError
from mobiq_lightning.nn import BlockLayout, CalibratedBlock, fixed_depth, full_precision, routed_inputs
from mobiq_lightning.packing import PackedSlices
from mobiq_lightning.sources import Source, load_source
from mobiq_lightning.strategies import (
    HadamardRotation,
    LearnableEquivalentTransform,
    MLPRouter,
    ResidualSlices,
    SliceScheme,
    Transform,
)
from mobiq_lightning.strategies.transforms.hadamard import random_signs, rotate
from tests.checkpoints import IDS, logits_of
from tests.strategies.kinds import subclasses

KINDS = subclasses(Transform)
MODELS: list[dict[str, Any]] = [
    {"tied": True},  # grouped-query attention, as all of these
    {"tied": False, "attention_bias": True, "mlp_bias": True},
    {"kind": "qwen2"},
]


class Unsliced(SliceScheme):
    """Reads the weight as it is at every depth: what is left is what the transform does."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(out_features, in_features, (2, 2))

    def weight_at(self, weight: torch.Tensor, n_slices: int) -> torch.Tensor:
        return weight.float()

    def pack(self, weight: torch.Tensor) -> PackedSlices:
        raise NotImplementedError


def source_of(folder: Path) -> Source:
    """A source model whose norms are not all ones."""
    source = load_source(str(folder))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in source.model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return source


def calibrated(source: Source, transform: Transform, scheme: Any = Unsliced) -> list[CalibratedBlock]:
    blocks = BlockLayout().find(source.model)
    fold_into_source(source, blocks, transform)
    groups = [BlockLayout().group_linears(block, "input") for block in blocks]
    return [CalibratedBlock(b, g, scheme, MLPRouter, transform) for b, g in zip(blocks, groups, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
class TestContract:
    @pytest.mark.parametrize("model", MODELS, ids=str)
    def test_without_slicing_the_model_computes_what_it_did(
        self, make_model: Callable[..., Path], kind: Any, model: dict[str, Any]
    ) -> None:
        source = source_of(make_model(**model))
        before = logits_of(source.model)
        blocks = calibrated(source, kind())
        torch.manual_seed(0)
        for parameter in [p for block in blocks for p in block.parameters_of("transforms")]:
            nn.init.normal_(parameter, std=0.5)
        inputs = routed_inputs(source.model)
        for reading in (fixed_depth(inputs, 4), full_precision(inputs)):
            with reading:
                torch.testing.assert_close(logits_of(source.model), before, atol=1e-4, rtol=1e-4)

    def test_the_same_arguments_give_the_same_model(self, make_model: Callable[..., Path], kind: Any) -> None:
        models = [load_source(str(make_model())).model for _ in range(2)]
        for model in models:
            kind().change_model(model, model.model.layers)
        first, second = (model.state_dict() for model in models)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_its_description_builds_it_again(self, kind: Any) -> None:
        described = kind().describe()
        assert described["class_path"] == f"mobiq_lightning.strategies.{kind.__name__}"
        assert json.loads(json.dumps(described)) == described
        assert kind(**described["init_args"]).describe() == described

    def test_what_is_stored_of_an_input_gives_the_same_bits(self, kind: Any) -> None:
        learned = kind().for_input(12)
        if learned is None:
            return
        torch.manual_seed(0)
        x, weight = torch.randn(50, 12) + 1, torch.randn(6, 12)
        learned.initialize(x, [weight])
        stored = build_transform(list(learned.stored()), 12)
        assert stored is not None
        stored.load_state_dict(learned.stored())
        assert all(value.dtype == torch.float32 for value in stored.state_dict().values())
        assert torch.equal(stored.to_input(x), learned.to_input(x))
        product = stored.to_input(x) @ stored.to_weight(weight).T + stored.to_bias(weight, None)
        torch.testing.assert_close(product, x @ weight.T, atol=1e-5, rtol=1e-5)

    def test_it_begins_with_the_same_whenever_it_begins(self, kind: Any) -> None:
        inputs = [kind().for_input(12) for _ in range(2)]
        for number, learned in enumerate(inputs):
            if learned is None:
                return
            torch.manual_seed(number)  # nothing else may decide
            learned.initialize(torch.linspace(-1, 3, 60).view(5, 12), [torch.eye(12) + 0.1])
        assert all(torch.equal(a, b) for a, b in zip(inputs[0].parameters(), inputs[1].parameters(), strict=True))


class TestHadamardRotation:
    @pytest.mark.parametrize("width", [1, 7, 16, 48])
    def test_rotations_are_orthonormal_at_every_width(self, width: int) -> None:
        signs = random_signs(width, torch.Generator().manual_seed(0))
        matrix = rotate(torch.eye(width, dtype=torch.float64), signs)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
        pieces = rotate(torch.eye(2 * width, dtype=torch.float64), signs)
        torch.testing.assert_close(pieces, torch.block_diag(matrix, matrix))

    def test_a_hidden_size_that_is_no_power_of_two_is_rotated_in_blocks(self) -> None:
        source = random_source(hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
        before = logits_of(source.model)
        fold_into_source(source, source.model.model.layers, HadamardRotation())
        torch.testing.assert_close(logits_of(source.model), before, atol=1e-4, rtol=1e-4)

    def test_every_weight_of_the_stream_and_of_the_values_is_rotated(self, make_model: Callable[..., Path]) -> None:
        source = source_of(make_model())
        before = {name: value.clone() for name, value in source.model.state_dict().items()}
        fold_into_source(source, source.model.model.layers, HadamardRotation(seed=3))
        after = source.model.state_dict()
        assert {name for name in before if torch.equal(before[name], after[name])} == set()
        assert all(bool((value == 1).all()) for name, value in after.items() if "norm" in name)
        assert source.config_changes == {"tie_word_embeddings": False}

    def test_outlier_channels_are_spread_and_cost_less(self) -> None:
        errors, kurtosis = [], []
        for transform in (None, HadamardRotation()):
            source = random_source(hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
            with torch.no_grad():  # channels 3 and 17 of the stream
                for linear in source.model.model.layers[0].self_attn.children():
                    linear.weight[:, [3, 17]] *= 30
            if transform is not None:
                fold_into_source(source, source.model.model.layers, transform)
            weight = source.model.model.layers[0].self_attn.q_proj.weight.detach()
            rounded = ResidualSlices(64, 64, (2,), group_size=64).weight_at(weight, 1)
            errors.append(float((rounded.detach() - weight).norm() / weight.norm()))
            kurtosis.append(float((weight / weight.std()).pow(4).mean()))
        assert errors[1] < 0.7 * errors[0]
        assert kurtosis[1] < 6 < 30 < kurtosis[0]

    @pytest.mark.parametrize("family", ["Gemma", "Olmo", "Cohere", "Starcoder2"])
    def test_models_with_other_norms_or_parts_are_refused_unchanged(self, family: str) -> None:
        source = random_source(family)
        before = {name: value.clone() for name, value in source.model.state_dict().items()}
        with pytest.raises(ModelError, match=f"stream of {family}ForCausalLM cannot be rotated.*norm") as raised:
            fold_into_source(source, source.model.model.layers, HadamardRotation())
        said = {
            "Gemma": "GemmaRMSNorm) is no RMS norm",
            "Olmo": "OlmoLayerNorm) has no weight",
            "Starcoder2": "LayerNorm",
        }
        assert said.get(family, "post_attention_layernorm") in str(raised.value)
        assert all(torch.equal(before[name], value) for name, value in source.model.state_dict().items())

    def test_a_transform_that_changes_the_logits_is_refused_with_the_figures(self) -> None:
        class Careless(Transform):
            def change_model(self, model: Any, blocks: nn.ModuleList) -> dict[str, Any]:
                blocks[0].self_attn.o_proj.weight.data *= 1.1  # type: ignore[union-attr,operator]
                return {}

        source = random_source()
        with pytest.raises(ModelError, match=r"Careless changed what tiny .*differ by 0\.\d+ of their spread, 0.00035"):
            fold_into_source(source, source.model.model.layers, Careless())

    def test_half_precision_is_rounded_once_and_within_the_tolerance(self, make_model: Callable[..., Path]) -> None:
        source = source_of(make_model(tied=False, dtype=torch.bfloat16))
        fold_into_source(source, source.model.model.layers, HadamardRotation())
        assert {value.dtype for value in source.model.state_dict().values()} == {torch.bfloat16}


def random_source(family: str = "Llama", **settings: Any) -> Source:
    import transformers

    small = {
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{**small, "head_dim": 16, "vocab_size": 300, "pad_token_id": 0, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    return Source("tiny", model, None, "", Path())


class TestLearnableEquivalentTransform:
    def test_it_begins_as_smoothquant_at_the_mean_of_the_channels(self) -> None:
        learned = LearnableEquivalentTransform(alpha=0.25).for_input(3)
        x = torch.tensor([[1.0, 0.0, 10.0], [3.0, 0.0, -10.0]])
        weights = [torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[-4.0, 1.0, 0.1], [0.0, 0.0, 0.0]])]
        learned.initialize(x, weights)
        assert learned.channel_shift().tolist() == [2.0, 0.0, 0.0]  # type: ignore[union-attr]
        wanted = torch.tensor([1.0, 1e-5, 10.0]) ** 0.25 / torch.tensor([4.0, 2.0, 0.5]) ** 0.75
        wanted /= wanted.prod() ** (1 / 3)
        torch.testing.assert_close(learned.channel_scale().detach(), wanted)

    def test_without_a_shift_linears_get_no_bias(self) -> None:
        learned = LearnableEquivalentTransform(shift=False).for_input(4)
        assert list(learned.stored()) == ["scale"]
        assert learned.to_bias(torch.ones(2, 4), None) is None

    @pytest.mark.parametrize("alpha", [-0.1, 1.5])
    def test_an_alpha_outside_of_its_range_is_refused(self, alpha: float) -> None:
        with pytest.raises(ValueError, match=r"alpha \(.*\) must lie in \[0, 1\]"):
            LearnableEquivalentTransform(alpha=alpha)

    def test_gradients_reach_all_scales_and_shifts(self) -> None:
        source = random_source()
        block = calibrated(source, LearnableEquivalentTransform(), functools.partial(ResidualSlices, group_size=16))[0]
        inputs, learned = block.routed_inputs(), block.parameters_of("transforms")
        assert len(learned) == 2 * len(inputs)
        for reading in (fixed_depth(inputs, 2), nullcontext()):
            with reading:
                source.model(IDS).logits.square().mean().backward()
            for parameter in learned:
                assert parameter.grad is not None
                assert float((parameter.grad != 0).float().mean()) > 0.9
                parameter.grad = None

    def test_routers_see_the_input_without_it(self) -> None:
        source = random_source()
        block = calibrated(source, LearnableEquivalentTransform())[0]
        routed = block.routed_inputs()[0]
        seen: list[torch.Tensor] = []
        read: list[torch.Tensor] = []
        scores, to_input = routed.router.scores, routed.transform.to_input  # type: ignore[union-attr]
        routed.router.scores = lambda x: seen.append(x) or scores(x)  # type: ignore[assignment,func-returns-value]
        alive: list[weakref.ref[torch.Tensor]] = []

        def watched(x: torch.Tensor) -> torch.Tensor:
            made = to_input(x)
            read.append(made.clone())
            alive.append(weakref.ref(made))
            return made

        routed.transform.to_input = watched  # type: ignore[union-attr,assignment]
        before = logits_of(source.model)
        nn.init.constant_(block.parameters_of("transforms")[0], 1.0)
        torch.testing.assert_close(logits_of(source.model), before, atol=1e-4, rtol=1e-4)
        assert torch.equal(seen[0], seen[1])
        torch.testing.assert_close(read[1], read[0] / torch.e)
        assert len(read) == 2, "q, k and v share one transformed input"
        seen.clear()
        assert [ref() for ref in alive] == [None, None], "it is not kept longer than its tokens"

    def test_routers_that_look_at_weights_see_them_as_they_act_on_that_input(self) -> None:
        source = random_source()
        block = calibrated(source, LearnableEquivalentTransform())[0]
        nn.init.normal_(block.parameters_of("transforms")[0])
        for linear in block.readers[0][1]:
            for read in linear.prefixes_on_input():
                torch.testing.assert_close(read, linear.weight.detach())

    def test_a_block_begins_with_what_its_linears_read(self, make_model: Callable[..., Path]) -> None:
        source = source_of(make_model())
        blocks = calibrated(source, LearnableEquivalentTransform())
        decoder = list(source.model.model.layers)
        caller = BlockCaller(source.model, decoder, torch.device("cpu"))

        def reading(block: int, batch: int) -> Any:
            return full_precision(blocks[block].routed_inputs())

        ids = torch.randint(3, 300, (9, 10), generator=torch.Generator().manual_seed(0))
        hidden = HiddenStates(caller, ids, {"routed": reading}, reading, batch_size=4)
        initialize_transforms(blocks[0], hidden)
        normed = decoder[0].input_layernorm(hidden.inputs["routed"][:8])
        shift = blocks[0].transforms()[0].channel_shift()
        torch.testing.assert_close(shift, normed.flatten(0, 1).mean(0), atol=1e-6, rtol=1e-5)
        assert not decoder[0].self_attn.q_proj._forward_pre_hooks
        assert all(not bool(t.channel_scale().eq(1).any()) for t in blocks[0].transforms())
        assert all(bool(t.channel_scale().eq(1).all()) for t in blocks[1].transforms())
