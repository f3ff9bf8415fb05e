"""An elastic model in the hands of other libraries: what transformers, PyTorch and others do with a model of transformers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import mobiq_lightning
from mobiq_lightning.runtime.elastic_model import ElasticModel
from tests.checkpoints import IDS, generate, logits_of, write_checkpoint

MEANT = {"generate", "get_compiled_call", "__reduce_ex__"}
"""Names of transformers that the elastic model means to take the place of."""


@pytest.fixture(scope="module")
def checkpoint(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(make_model(), tmp_path_factory.mktemp("neighbours") / "elastic")


@pytest.fixture
def elastic(checkpoint: Path) -> Any:
    return mobiq_lightning.load(checkpoint, bits=3.2)


def test_no_name_of_an_elastic_model_hides_one_of_transformers(elastic: Any, make_model: Callable[..., Path]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(make_model())
    made_by_python = {*vars(type("Empty", (), {"__annotations__": {}})), "__static_attributes__", "__firstlineno__"}
    own = {*vars(ElasticModel), *ElasticModel.__annotations__} - made_by_python
    assert vars(elastic).keys() - vars(plain).keys() <= own | {"hf_quantizer", "quantization_method", "is_quantized"}
    theirs = {*dir(LlamaForCausalLM), *vars(plain)}
    for cls in LlamaForCausalLM.__mro__[:-1]:  # names that their methods use without a class having them
        theirs |= set(re.findall(r"\b(?:self|model)\.(\w+)", inspect.getsource(cls)))
    assert own & theirs == MEANT


@pytest.mark.parametrize("change", [lambda m: m.train(), lambda m: m.eval(), lambda m: m.train().eval()])
def test_the_mode_can_be_changed(elastic: Any, change: Callable[[Any], Any]) -> None:
    before = logits_of(elastic)
    change(elastic)
    assert torch.equal(logits_of(elastic), before)


def embeds_gradient(model: Any) -> torch.Tensor:
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    model(inputs_embeds=embeds, labels=IDS).loss.backward()
    assert embeds.grad is not None
    return embeds.grad


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_gradients_are_the_same_after_a_pass_without_them(elastic: Any, checkpoint: Path, mode: Any) -> None:
    with mode():
        elastic(input_ids=IDS)
        elastic.set_bits(3.2)
        generate(elastic, bits=3.2)
    assert torch.equal(embeds_gradient(elastic), embeds_gradient(mobiq_lightning.load(checkpoint, bits=3.2)))


def test_a_model_loaded_in_inference_mode_counts_and_turns_outside_of_it(checkpoint: Path, elastic: Any) -> None:
    with torch.inference_mode():
        other = mobiq_lightning.load(checkpoint, bits=3.2)
    for bits in (3.2, [2.0, 4.0]):
        for model in (other, elastic):
            model.set_bits(bits)
        assert torch.equal(logits_of(other), logits_of(elastic))
        assert other.bits_used() == elastic.bits_used()
