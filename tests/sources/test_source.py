"""Loading and checking source models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mobiq_lightning.errors import ModelError
from mobiq_lightning.nn import BlockLayout, CalibratedBlock, SlicedLinear
from mobiq_lightning.sources import check_finite, load_source
from mobiq_lightning.sources.model import fingerprint
from mobiq_lightning.strategies import MLPRouter, ResidualSlices

Maker = Callable[..., Path]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tied": False},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "sharded": True},
        {"kind": "qwen2"},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=str,
)
def test_models_of_the_family_load_as_they_are(make_model: Maker, arguments: dict[str, Any]) -> None:
    folder = make_model(**arguments)
    source = load_source(str(folder))
    assert source.model.dtype == arguments.get("dtype", torch.float32)
    assert not any(p.requires_grad for p in source.model.parameters())
    if arguments.get("sharded"):
        assert len(list(folder.glob("*.safetensors"))) > 1


def test_linears_of_one_input_share_a_router_or_have_their_own(make_model: Maker) -> None:
    block = load_source(str(make_model())).model.model.layers[0]
    shared = BlockLayout().group_linears(block, "input")
    assert [len(names) for names in shared] == [3, 1, 2, 1]
    assert shared[0] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert [len(names) for names in BlockLayout().group_linears(block, "linear")] == [1] * 7


def test_slicing_a_block_replaces_its_linears_and_keeps_their_weights(make_model: Maker) -> None:
    source = load_source(str(make_model(kind="qwen2")))
    block = source.model.model.layers[0]
    q_proj = block.self_attn.q_proj
    groups = BlockLayout().group_linears(block, "input")
    calibrated = CalibratedBlock(block, groups, lambda o, i: ResidualSlices(o, i, group_size=16), MLPRouter)
    sliced = block.self_attn.q_proj
    assert isinstance(sliced, SlicedLinear)
    assert sliced.weight is q_proj.weight
    assert sliced.bias is q_proj.bias
    assert len(calibrated.routed_inputs()) == 4
    assert sum(r.n_weights for r in calibrated.routed_inputs()) == sum(
        m.weight.numel() for m in block.modules() if isinstance(m, SlicedLinear)
    )


def test_a_quantized_model_is_refused_with_its_method(make_model: Maker, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"already quantized.*gptq"):
        load_source(str(folder))


def test_a_tokenizer_of_another_model_is_refused_with_both_sizes(make_model: Maker, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model(), tmp_path / "m")
    from tests.conftest import make_tokenizer

    make_tokenizer(500).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"has 500 tokens, the model's embedding 304"):
        load_source(str(folder))


def test_missing_weights_are_refused_instead_of_made_up(make_model: Maker, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(make_model(), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_source(str(folder))


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("someone/some-model", "neither a local folder, nor in the local cache, nor reachable"),
    ],
)
def test_a_model_that_is_not_there_says_where_it_was_looked_for(pretrained: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_source(pretrained)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_source(str(tmp_path))


def test_damaged_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="0: 1 of 16 weights are NaN"):
        check_finite(model, ["0"])


def test_a_model_without_decoder_blocks_is_told_how_to_describe_its_layout() -> None:
    with pytest.raises(ModelError, match=r"model\.layout\.blocks \(lists in this model: 0\)"):
        BlockLayout().find(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])))


def test_the_fingerprint_follows_the_weights(make_model: Maker, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model(), tmp_path / "m")
    before = fingerprint(folder)
    assert before == fingerprint(make_model())
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert fingerprint(folder) != before
