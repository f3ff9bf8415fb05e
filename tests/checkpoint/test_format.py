"""The format of a checkpoint: keys of config.json, and what is refused of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

import mobiq_lightning
from mobiq_lightning.checkpoint import ElasticFormat, verify
from mobiq_lightning.checkpoint.format import FORMAT_VERSION, needed_version
from mobiq_lightning.checkpoint.quantizer import ElasticConfig
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.nn import BlockLayout, ElasticLinear
from mobiq_lightning.packing import CODES
from tests.checkpoints import logits, rehash

GUIDE = Path(__file__).parents[2] / "docs" / "checkpoint-format.md"
ROUTER = {"class_path": "mobiq_lightning.strategies.MLPRouter", "init_args": {"hidden_features": 4}}


def stored(**changes: Any) -> dict[str, Any]:
    """Keys as a checkpoint has them."""
    transform = {"class_path": "mobiq_lightning.strategies.NoTransform", "init_args": {}, "stored": []}
    return {
        "quant_method": "mobiq",
        "format_version": 1,
        "slice_bits": [2, 1, 1, 2, 2],
        "group_size": 16,
        "router": ROUTER,
        "transform": transform,
        "layout": asdict(BlockLayout()),
        "share_routers": "input",
        "threshold_scope": "layer",
        "default_bits": 4.0,
        "max_bits": None,
    } | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_bits": 4},
        {"format_version": 2, "code": "per_slice"},
        {"share_routers": "linear"},
        {"format_version": 3, "budget_step": 0.125},
    ],
)
def test_what_was_written_is_read_and_written_again_in_the_same_order(changes: dict[str, Any]) -> None:
    config = stored(**changes)
    assert json.dumps(ElasticFormat.from_json(config).to_json()) == json.dumps(config)
    assert json.dumps(ElasticConfig.from_dict(config).to_dict()) == json.dumps(config)


def test_keys_that_older_checkpoints_lack_have_the_values_that_these_checkpoints_were_made_with() -> None:
    config = stored()
    for key in ("format_version", "transform", "share_routers", "threshold_scope", "default_bits", "max_bits"):
        del config[key]
    found = ElasticFormat.from_json(config)
    assert (found.format_version, found.code, found.transform, found.stored) == (1, "nested", None, [])
    assert (found.share_routers, found.threshold_scope, found.default_bits, found.n_planes) == (
        "input",
        "layer",
        4.0,
        8,
    )


def test_the_version_is_the_lowest_that_says_what_is_stored() -> None:
    assert {code: needed_version(code, []) for code in CODES} == {
        "nested": 1,
        "per_slice": 2,
        "per_plane": 2,
        "codebook": 2,
    }
    assert needed_version("nested", ["scale"]) == 2
    assert needed_version("nested", [], 0.125) == FORMAT_VERSION == 3
    config = stored(transform={**stored()["transform"], "stored": ["scale"]})
    del config["format_version"]
    assert ElasticFormat.from_json(config).format_version == 2
    assert ElasticFormat.from_json(stored(transform=config["transform"])).format_version == 1, "kept as it was written"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slice_bit": [2, 2]}, r"quantization_config has an unknown key 'slice_bit'\. Did you mean 'slice_bits'"),
        ({"zzz": 1}, r"unknown key 'zzz'\. The keys are quant_method, format_version, slice_bits"),
        ({"router": {**ROUTER, "init_arg": {}}}, r"\.router has an unknown key 'init_arg'\. Did you mean 'init_args'"),
        ({"layout": {"block": "model.layers"}}, r"\.layout has an unknown key 'block'\. Did you mean 'blocks'"),
        (
            {"transform": {**stored()["transform"], "store": []}},
            r"\.transform has an .* 'store'\. Did you mean 'stored'",
        ),
        ({"format_version": 4, "new_key": 1}, "format version 4; this version of mobiq-lightning reads up to 3"),
        ({"format_version": "2"}, "format version 2"),
        ({"format_version": True}, "format version True"),
        ({"quant_method": "gptq"}, r"quant_method should be 'mobiq', and is 'gptq'"),
        ({"budget_step": 0}, r"budget_step should be a number of bits from 1/256 to 8, and is 0"),
        ({"budget_step": 1e-9}, r"budget_step should be a number of bits from 1/256 to 8, and is 1e-09"),
        ({"slice_bits": [2, 0]}, r"slice_bits should be a list of positive integers .* and is \[2, 0\]"),
        ({"slice_bits": [4, 4, 4]}, r"add up to at most 8, and is \[4, 4, 4\]"),
        ({"slice_bits": []}, r"slice_bits should be .* and is \[\]"),
        ({"group_size": 0}, "group_size should be a positive integer .*, and is 0"),
        ({"group_size": None}, "group_size should be a positive integer .*, and is None"),
        ({"router": "MLPRouter"}, r"router should be a mapping with class_path, .* and is 'MLPRouter'"),
        ({"router": {"init_args": {}}}, "router should be a mapping with class_path"),
        ({"transform": {"class_path": "a.B", "stored": "scale"}}, "transform should be null, or a mapping"),
        ({"layout": {"shared_inputs": ["q_proj"]}}, "layout should be a mapping with blocks"),
        ({"share_routers": "layer"}, r"share_routers should be 'input' or 'linear', and is 'layer'"),
        ({"threshold_scope": "all"}, r"threshold_scope should be 'layer' or 'global', and is 'all'"),
        ({"group_size": 2**70}, r"group_size should be a positive integer below 2\^31, and is 1180591620717411303424"),
        ({"default_bits": "4"}, "default_bits should be a number of bits from 1 to 8, and is '4'"),
        ({"default_bits": float("nan")}, "default_bits should be a number of bits from 1 to 8, and is nan"),
        ({"max_bits": 5}, r"max_bits should be null or one of the depths \[2, 3, 4, 6, 8\], and is 5"),
        ({"layout": {"blocks": "model..layers"}}, "layout should be a mapping with blocks, a dotted path"),
        ({"router": {"class_path": "a.B", "init_args": {"a b": 1}}}, "router should be a mapping with class_path"),
        ({"max_bits": 2.5}, "max_bits should be null, or a positive integer, and is 2.5"),
        ({"code": ["nested"]}, r"there is no code \['nested'\]; there are nested"),
    ],
)
def test_keys_and_values_that_cannot_be_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    for read in (ElasticFormat.from_json, ElasticConfig.from_dict):
        with pytest.raises(CheckpointError, match=message):
            read(stored(**changes))


@pytest.mark.parametrize("key", ["check_hashes", "trust_router"])
@pytest.mark.parametrize("read", [ElasticConfig.from_dict, ElasticFormat.from_json])
def test_no_file_decides_what_is_checked_or_trusted(key: str, read: Callable[..., Any]) -> None:
    with pytest.raises(CheckpointError, match=f"unknown key '{key}'"):
        read(stored(**{key: False}))


def with_config(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other values in config.json."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] |= changes
    (to / "config.json").write_text(json.dumps(config))
    rehash(to)
    return to


def test_a_router_named_by_the_file_that_defines_it_loads_as_by_its_public_path(
    uncalibrated: Path, tmp_path: Path
) -> None:
    assert verify(uncalibrated) == []
    config = json.loads((uncalibrated / "config.json").read_text())["quantization_config"]
    assert config["router"]["class_path"] == "mobiq_lightning.strategies.MLPRouter"
    by_file = {**config["router"], "class_path": "mobiq_lightning.strategies.routers.mlp.MLPRouter"}
    old = mobiq_lightning.load(with_config(uncalibrated, tmp_path / "old", router=by_file))
    new = mobiq_lightning.load(uncalibrated)
    assert torch.equal(logits(old, 3.3), logits(new, 3.3))
    assert {type(routed.router) for routed in old.dial.inputs} == {type(routed.router) for routed in new.dial.inputs}
    old.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["router"]
    assert kept == by_file, "what was stored is not rewritten"


def test_a_checkpoint_with_an_unknown_key_is_not_loaded(uncalibrated: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    changed = with_config(uncalibrated, tmp_path / "changed", threshold_scop="global")
    for load in (mobiq_lightning.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="Did you mean 'threshold_scope'"):
            load(changed)


class TestGuide:
    """What docs/checkpoint-format.md says."""

    def test_it_names_every_key_and_code(self) -> None:
        named = set(re.findall(r"^\| `(\w+)` \|", GUIDE.read_text(), re.MULTILINE))
        assert {field.name for field in fields(ElasticFormat)} <= named
        assert set(CODES) <= named

    @pytest.mark.parametrize("n_bits", [2, 3, 8])
    def test_its_reader_gives_the_weights_that_the_package_reads(self, uncalibrated: Path, n_bits: int) -> None:
        place: dict[str, Any] = {}
        exec(GUIDE.read_text().split("```python\n")[1].split("```")[0], place)
        model = mobiq_lightning.load(uncalibrated)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, ElasticLinear)}
        assert len(linears) == 14
        for name, linear in linears.items():
            assert torch.equal(
                place["read_weight"](uncalibrated, name, linear.in_features, n_bits), linear.weight_at(n_bits)
            )
