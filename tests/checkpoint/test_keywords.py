"""`load` honours every argument of `from_pretrained`, or refuses it with what to do instead."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import mobiq_lightning
from mobiq_lightning.checkpoint.keywords import _HONOURED, _ONLY, _REFUSED, HUB_KEYWORDS
from mobiq_lightning.errors import BitsError, CheckpointError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": {}}, "config cannot be given"),
        ({"quantization_config": {"bits": 4}}, "quantization_config cannot be given"),
        ({"output_loading_info": True}, "output_loading_info cannot be given"),
        ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes cannot be given"),
        ({"state_dict": {}}, "state_dict cannot be given"),
        ({"trust_remote_code": True}, "trust_remote_code can only be False"),
        ({"use_safetensors": False}, "use_safetensors can only be True"),
        ({"weights_only": False}, "weights_only can only be True"),
        ({"dtype": torch.int8}, "dtype torch.int8 is none of auto, float32, bfloat16, float16, float64"),
        ({"dtype": "bf16"}, "dtype 'bf16' is none of"),
        ({"device": "cpu", "device_map": "auto"}, "give device or device_map, not both"),
        ({"device": "nope"}, "device 'nope' is none"),
        ({"device": "meta"}, "nothing can be computed on 'meta'"),
        ({"device_map": {"": "disk"}}, "nothing can be computed on 'disk'"),
        ({"check_hashes": "no"}, "check_hashes should be True or False, and is 'no'"),
        ({"trust_router": 5}, "trust_router should be the dotted path of a class, and is 5"),
        ({"max_bits": 4.0}, "max_bits should be a whole number, and is 4.0"),
        ({"subfolder": 5}, r"subfolder \(5\) should be the name of a folder"),
        ({"revision": "nonsense"}, "has no revisions"),
        ({"_name_or_path": "x"}, "_name_or_path"),
        (
            {"num_hidden_layers": 1},
            "num_hidden_layers cannot be given; config.json of the checkpoint says what the model is",
        ),
        ({"model_type": "mistral"}, "model_type cannot be given"),
        ({"max_bit": 4}, "there is no argument 'max_bit'. Did you mean 'max_bits'"),
        ({"atn_implementation": "eager"}, "Did you mean 'attn_implementation'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(uncalibrated: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        mobiq_lightning.load(uncalibrated, **given)


@pytest.mark.parametrize("source", [None, 3, "", " ", b"x", "a\0b", "x" * 300, ["a"]])
def test_what_names_no_checkpoint_is_refused(source: Any) -> None:
    with pytest.raises(CheckpointError, match=r"elastic checkpoint|can be no folder .* leaves a checkpoint in"):
        mobiq_lightning.load(source)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_a_dtype_by_either_name(uncalibrated: Path, name: str, dtype: Any) -> None:
    assert mobiq_lightning.load(uncalibrated, **{name: dtype}).dtype == torch.bfloat16


def test_an_attention_and_a_key_of_the_configuration(uncalibrated: Path) -> None:
    model = mobiq_lightning.load(uncalibrated, attn_implementation="eager", use_cache=False, low_cpu_mem_usage=True)
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False


def test_a_subfolder_of_a_folder(uncalibrated: Path, tmp_path: Path) -> None:
    shutil.copytree(uncalibrated, tmp_path / "repository" / "eight")
    assert mobiq_lightning.load(tmp_path / "repository", subfolder="eight").dial.highest == 8


def test_what_is_asked_of_the_hub_reaches_it(uncalibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(repo_id: str, **given: Any) -> str:
        asked.update(given, repo_id=repo_id)
        return str(uncalibrated)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    given = {
        "revision": "v2",
        "token": "secret",
        "cache_dir": "cache",
        "local_files_only": True,
        "force_download": False,
    }
    mobiq_lightning.load("somebody/elastic", **given)
    assert asked == {**given, "repo_id": "somebody/elastic"}


def test_every_argument_that_transformers_declares_is_known_here() -> None:
    declared = {
        name
        for name, parameter in inspect.signature(PreTrainedModel.from_pretrained).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY or parameter.default is not parameter.empty
    }
    assert declared <= {*HUB_KEYWORDS, *_HONOURED, *_REFUSED, *_ONLY}


def test_no_bits_are_no_bits(uncalibrated: Path) -> None:
    with pytest.raises(BitsError, match="no prefix of the slices"):
        mobiq_lightning.load(uncalibrated, max_bits=0)
