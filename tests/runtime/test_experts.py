"""Elastic models with experts: loaded as written, read by rows, saved, multiplied by the kernels, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families import FAMILIES
from mobiq_lightning.calibration.fit_checks import check_resumed
from mobiq_lightning.checkpoint import load
from mobiq_lightning.errors import RunFolderError
from mobiq_lightning.latency.shapes import groups_of
from mobiq_lightning.nn import BlockLayout, ElasticLinear, RoutedExperts, product_groups, stored_bits
from mobiq_lightning.outliers import InputErrors
from mobiq_lightning.runtime import GraphedStep
from mobiq_lightning.sources import load_source
from tests.checkpoints import generate, logits, write_checkpoint
from tests.conftest import make_tokenizer

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
KINDS = ["Mixtral", "Qwen2-MoE", "Llama 4 (text)", "GPT-OSS"]


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    family = next(family for family in FAMILIES if family.name == request.param)
    family.tiny().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return write_checkpoint(folder / "model", folder / "elastic")


@pytest.fixture
def model(written: Path) -> Any:
    return load(written)


def test_rows_with_budgets_of_their_own_are_read_as_alone_and_padding_is_not_counted(model: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    model.set_bits([2.0, 5.0])
    with torch.no_grad():
        both = model(input_ids=IDS, attention_mask=mask).logits
    used = model.bits_used()
    assert used.n_tokens == 12 + 7
    assert used.per_row[0] == 2
    model.set_bits(5.0)
    with torch.no_grad():
        alone = model(input_ids=IDS[1:]).logits
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)
    assert model.bits_used().code_bits == pytest.approx(used.per_row[1])


def test_beams_and_static_caches_generate(model: Any) -> None:
    model.set_bits([2.0, 5.0])
    assert generate(model, IDS, num_beams=2).shape == (2, 18)
    model.set_bits(5.0)
    expected = generate(model, IDS)
    assert torch.equal(generate(model, IDS, cache_implementation="static"), expected)
    assert GraphedStep(model)._varies


def test_what_is_saved_loads_and_computes_the_same(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved"), 4.5, IDS), logits(model, 4.5, IDS))
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["layout"]
    assert stored["experts"] is True


def test_linears_of_experts_are_multiplied_alone_and_so_many_are_timed_as_a_token_reads(model: Any) -> None:
    experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    alone = [named for named in product_groups(model) if not named[0][1].decides]
    assert len(alone) == sum(2 * of_block.n_experts for of_block in experts)
    assert all(len(named) == 1 for named in alone)
    timed = [linears[0] for groups in groups_of(model, "model").values() for linears in groups]
    assert sum(not linear.decides for linear in timed) == sum(2 * of_block.top_k for of_block in experts)


def test_errors_of_shared_experts_are_watched_token_by_token(model: Any, written: Path) -> None:
    source = load_source(str(written.parent / "model")).model
    BlockLayout().open(source)
    watched = InputErrors(source, model, [2, 8])
    counted = torch.ones(2, 11, dtype=torch.bool)
    counted[0, :4] = False
    with watched.watch(counted), torch.no_grad():
        source(input_ids=IDS, use_cache=False)
    errors = watched.errors()
    assert not any(".experts." in name for name in errors)
    assert any("shared_expert" in name for name in errors) == (model.config.model_type in ("qwen2_moe", "llama4_text"))
    assert all(error.shape == (2, 18) for error in errors.values())
    assert all(bool((error[1] < error[0]).all()) for error in errors.values())


def test_gates_in_full_precision_count_in_all_in_bits(model: Any) -> None:
    beside = stored_bits(model)
    sliced = sum(module.n_weights for module in model.modules() if isinstance(module, ElasticLinear))
    assert 0.9 < beside.sliced < 1
    kept = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.endswith((".gate.weight", "router.weight", "expert_gate.weight")) and ".input." not in name
    )
    assert beside.sliced == pytest.approx(sliced / (sliced + kept))
    model.set_bits(4)
    with torch.no_grad():
        model(input_ids=IDS)
    used = model.bits_used()
    assert used.all_in_bits == pytest.approx(used.code_bits * beside.sliced + beside.overhead + beside.routers)


@pytest.mark.parametrize("written", ["GPT-OSS"], indirect=True)
def test_the_kernels_give_what_the_reference_gives(model: Any) -> None:
    few = IDS[:1, :3]
    model.switch_kernels(False)
    model.set_bits(4.5)
    with torch.no_grad():
        expected = model(input_ids=few).logits
    used = model.bits_used()
    model.switch_kernels(True)
    model.set_bits(4.5)
    with torch.no_grad():
        found = model(input_ids=few).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert model.bits_used().code_bits == used.code_bits
    experts = next(module for module in model.modules() if isinstance(module, RoutedExperts))
    assert all(linear.own_kernel is not None for linear in experts.linears())
    model.switch_kernels(False)
    assert torch.equal(logits(model, 4.5, few), expected)


def test_a_run_from_before_experts_were_sliced_is_refused(tmp_path: Path) -> None:
    dense = ["blocks.0.schemes.mlp-up_proj"]
    own = [*dense, "blocks.1.schemes.self_attn-q_proj", "blocks.1.schemes.mlp-experts-0-down_proj"]
    stored = [f"{name}.clip" for name in own]
    with pytest.raises(RunFolderError, match="left experts in full precision"):
        check_resumed(stored[:2], own, tmp_path)
    for held in (stored, stored[:1], []):  # all blocks, those in training alone, none
        check_resumed(held, own, tmp_path)
