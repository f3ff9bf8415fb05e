"""What transformers saves of a loaded checkpoint stays whole, loadable and comparable with its hashes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mobiq_lightning
from mobiq_lightning.checkpoint import export, verify
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.runs import HASHES, INDEX
from tests.checkpoints import edit_json, logits, tensors_of


@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_saved_loads_and_verifies(
    elastic: Path, tmp_path: Path, in_place: bool, settings: dict[str, Any]
) -> None:
    model = mobiq_lightning.load(elastic)
    before = tensors_of(elastic)
    to = elastic if in_place else tmp_path / "saved"
    model.save_pretrained(to, **settings)
    assert verify(to) == []
    assert before.keys() == tensors_of(to).keys()
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(to).items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(mobiq_lightning.load(to), 3.3), logits(model, 3.3))


def test_what_else_lies_in_the_folder_is_left_alone(elastic: Path, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "diary.txt").write_text("mine")
    mobiq_lightning.load(elastic).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "diary.txt").read_text() == "mine"
    assert "diary.txt" not in json.loads((tmp_path / "saved" / HASHES).read_text())["files"]


def test_a_copy_of_what_was_saved_can_be_exported(elastic: Path, tmp_path: Path) -> None:
    mobiq_lightning.load(elastic).save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "copy", max_bits=4)
    assert verify(tmp_path / "copy") == []


def test_saving_in_place_keeps_what_is_known_of_damage_to_other_files(elastic: Path) -> None:
    model = mobiq_lightning.load(elastic)
    (elastic / "tokenizer.json").write_text("{}")
    model.save_pretrained(elastic)
    assert verify(elastic) == ["tokenizer.json is not what was written"]


def test_a_file_that_was_changed_on_purpose_can_be_kept(elastic: Path) -> None:
    edit_json(elastic, "generation_config.json", lambda config: config.update(max_new_tokens=7))
    with pytest.raises(CheckpointError, match=r"check_hashes=False\)\.save_pretrained") as refused:
        mobiq_lightning.load(elastic)
    assert str(elastic) in str(refused.value)
    mobiq_lightning.load(elastic, check_hashes=False).save_pretrained(elastic)
    assert verify(elastic) == []
    assert mobiq_lightning.load(elastic).generation_config.max_new_tokens == 7


def test_the_first_planes_do_not_replace_all(elastic: Path) -> None:
    before = tensors_of(elastic)
    with pytest.raises(CheckpointError, match=r"holds a checkpoint of 8 bits, and this model only the first 4"):
        mobiq_lightning.load(elastic, max_bits=4).save_pretrained(elastic)
    assert before.keys() == tensors_of(elastic).keys()
    assert verify(elastic) == []


@pytest.mark.parametrize("load", [mobiq_lightning.load, AutoModelForCausalLM.from_pretrained])
def test_a_checkpoint_without_hashes_loads_and_says_so(elastic: Path, load: Callable[..., Any]) -> None:
    (elastic / HASHES).unlink()
    with pytest.warns(UserWarning, match=f"has no {HASHES}: what is loaded cannot be compared"):
        load(elastic)
    assert verify(elastic) == [f"{HASHES} is missing, so bytes cannot be compared with what was written"]


@pytest.mark.parametrize("load", [mobiq_lightning.load, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("part", ["tensors", "files"])
def test_hashes_that_were_emptied_do_not_turn_the_comparison_off(elastic: Path, load: Any, part: str) -> None:
    edit_json(elastic, HASHES, lambda hashes: hashes[part].clear())
    with pytest.raises(CheckpointError, match=f"has no hash in {HASHES}"):
        load(elastic)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", INDEX])
@pytest.mark.parametrize("load", [mobiq_lightning.load, AutoModelForCausalLM.from_pretrained])
def test_a_changed_file_that_is_no_tensor_is_not_loaded(elastic: Path, load: Callable[..., Any], name: str) -> None:
    (elastic / name).write_bytes((elastic / name).read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=f"{name} is not what was written"):
        load(elastic)
    mobiq_lightning.load(elastic, check_hashes=False)


def test_hashes_are_fetched_of_a_checkpoint_in_the_hubs_cache(
    elastic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    wanted = ("config.json", INDEX, "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
              "model-00003-of-00003.safetensors")  # fmt: skip
    for name in wanted:  # transformers fetches no more
        (elastic / name).rename(snapshot / name)
    asked: list[tuple[str, str, str]] = []

    def download(repo_id: str, filename: str, revision: str, cache_dir: Path) -> str:
        asked.append((repo_id, filename, revision))
        assert cache_dir == tmp_path
        return str((elastic / filename).replace(snapshot / filename))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(snapshot)
    assert asked == [("a/b", HASHES, "0123abc")]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(elastic: Path, tmp_path: Path) -> None:
    model = mobiq_lightning.load(elastic)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="variant cannot be given"):
        model.save_pretrained(tmp_path / "saved", variant="fp16")
    assert not (tmp_path / "saved").exists()
