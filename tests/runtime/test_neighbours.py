"""An elastic model in the hands of other libraries: what transformers, PyTorch and others do with a model of transformers."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

import mobiq_lightning
from mobiq_lightning.runtime.elastic_model import ElasticModel, _seen
from tests.checkpoints import IDS, generate, logits_of, write_checkpoint

MEANT = {"generate", "get_compiled_call", "__reduce_ex__", "save_pretrained"}
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


SHORT, LONG = IDS[:1, :5], IDS[:1, :9]
LEFT = torch.cat([torch.nn.functional.pad(SHORT, (4, 0)), LONG])
RIGHT = torch.cat([torch.nn.functional.pad(SHORT, (0, 4)), LONG])
LEFT_MASK, RIGHT_MASK = (LEFT != 0).long(), (RIGHT != 0).long()
READ = 2 * 3 + 5 + 9
"""Tokens read when four are added to each of the two prompts: the last is never read."""


def tokens_generated(model: Any, *args: Any, **settings: Any) -> int:
    model.generate(
        *args, **{"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "do_sample": False, **settings}
    )
    return int(model.bits_used().n_tokens)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"attention_mask": LEFT_MASK}, 1),
        ({}, 1),  # transformers finds the padding by its token
        ({"attention_mask": LEFT_MASK, "num_beams": 3}, 3),
        ({"attention_mask": LEFT_MASK, "do_sample": True, "num_return_sequences": 2}, 2),
        ({"attention_mask": LEFT_MASK, "prefill_chunk_size": 4}, 1),
    ],
    ids=["mask", "no mask", "beams", "samples", "chunks"],
)
def test_generation_counts_no_padding(elastic: Any, cache: dict[str, Any], settings: dict[str, Any], rows: int) -> None:
    assert tokens_generated(elastic, LEFT, **settings, **cache) == rows * READ


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_generation_from_embeddings_counts_no_padding(elastic: Any, cache: dict[str, Any]) -> None:
    embeds = elastic.get_input_embeddings()(LEFT)
    assert tokens_generated(elastic, inputs_embeds=embeds, attention_mask=LEFT_MASK, **cache) == READ


def masks() -> dict[str, Any]:
    """The same padding on the right, in every form that transformers takes."""
    seen = torch.ones(9, 9).tril().bool() & RIGHT_MASK.bool()[:, None, None, :]
    return {
        "whole numbers": RIGHT_MASK,
        "bool": RIGHT_MASK.bool(),
        "float": RIGHT_MASK.float(),
        "4-D bool": seen,
        "4-D additive": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
        "4-D infinite": torch.zeros(seen.shape).masked_fill(~seen & (torch.arange(9) != 0), -torch.inf),
    }


@pytest.mark.parametrize("form", masks())
def test_a_forward_pass_counts_no_padding_in_whatever_form_the_mask_comes(elastic: Any, form: str) -> None:
    mask = masks()[form]
    for arguments, keywords in (
        ((RIGHT, mask), {}),
        ((), {"input_ids": RIGHT, "attention_mask": mask}),
        ((), {"inputs_embeds": elastic.get_input_embeddings()(RIGHT), "attention_mask": mask}),
    ):
        elastic.set_bits(3.2)
        with torch.no_grad():
            elastic(*arguments, **keywords)
        assert elastic.bits_used().n_tokens == 14


def test_masks_over_pages_of_many_sequences_hold_no_padding() -> None:
    assert _seen(masks()["4-D bool"], RIGHT, cache=object()) is None


def test_sequences_packed_into_a_row_are_counted_whole(elastic: Any) -> None:
    with torch.no_grad():
        elastic(torch.cat([SHORT, LONG], 1), position_ids=torch.cat([torch.arange(5), torch.arange(9)])[None])
    assert elastic.bits_used().n_tokens == 14


def copied_by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copied_by_torch])
def test_copies_turn_by_themselves(elastic: Any, duplicate: Callable[[Any], Any]) -> None:
    other = duplicate(elastic)
    assert torch.equal(logits_of(other), logits_of(elastic))
    other.set_bits(8)
    assert elastic.budget == 3.2
    assert not torch.equal(logits_of(other), logits_of(elastic))


def test_a_pipeline_takes_bits_and_batches(elastic: Any, checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, pad_token="</s>", padding_side="left")
    writer = pipeline("text-generation", model=elastic, tokenizer=tokenizer)
    texts = ["def mean", "import os and more"]
    writer(texts, batch_size=2, max_new_tokens=4, min_new_tokens=4, do_sample=False, bits=2.0)
    assert elastic.bits_used().n_tokens == sum(len(tokenizer(text)["input_ids"]) + 3 for text in texts)
    assert elastic.bits_used().code_bits == 2.0
    assert elastic.budget == 3.2


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about names that peft uses
def test_a_prompt_can_be_trained_in_front_of_a_frozen_elastic_model(elastic: Any) -> None:
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(elastic, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tuned(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert [bool(p.grad.any()) for p in trained] == [True]
