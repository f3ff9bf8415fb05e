"""Source models in GGUF files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobiq_lightning.errors import MissingExtraError, ModelError
from mobiq_lightning.sources import load_source, read_shape
from mobiq_lightning.sources.gguf import ensure_gguf_folder

Maker = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, so that nothing is found in another's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOBIQ_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def gguf_file(make_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA as llama.cpp stores it: float32, rows of queries and keys in its order of rotary pairs."""
    return _write(make_model(), tmp_path_factory.mktemp("gguf") / "small.gguf")


def _write(folder: Path, path: Path, left_out: str = "", blocks: int | None = None) -> Path:
    import gguf

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    config, backend = model.config, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers if blocks is None else blocks)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    for add, number in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 0)):
        add(number)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if (name == "lm_head.weight" and config.tie_word_embeddings) or (left_out and left_out in name):
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None, name
        writer.add_tensor(stored, (_in_pairs(tensor, heads) if heads else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (O, I) of each head: the halves that rotate together side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape).contiguous()


def test_a_gguf_file_is_the_model_that_it_was_made_of(make_model: Maker, gguf_file: Path) -> None:
    source, original = load_source(str(gguf_file)), load_source(str(make_model()))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(source.model(ids).logits, original.model(ids).logits)
    text = "Numbers are compared by value."
    assert source.tokenizer.decode(source.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_it_is_turned_into_an_ordinary_folder_once(gguf_file: Path, cache: Path) -> None:
    first = load_source(str(gguf_file))
    written = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = load_source(str(gguf_file))
    assert again.folder == first.folder
    assert first.folder.parent == cache
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == written
    assert again.fingerprint == first.fingerprint
    assert AutoTokenizer.from_pretrained(first.folder).eos_token_id == 2
    assert "quantization_config" not in json.loads((first.folder / "config.json").read_text(encoding="utf-8"))
    assert not list(cache.glob(".gguf-*"))


def test_check_reads_its_shapes_too(gguf_file: Path) -> None:
    shape = read_shape(str(gguf_file))
    assert not shape.problems
    assert shape.model.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "wrong.gguf is missing"),
        (b"no", "wrong.gguf is no GGUF file"),
        (b"GGUF" + bytes(64), "cannot read .*wrong.gguf"),
    ],
    ids=["missing", "something else", "damaged"],
)
def test_what_is_no_model_is_refused_by_name(tmp_path: Path, content: bytes | None, message: str, cache: Path) -> None:
    path = tmp_path / "wrong.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_source(str(path))
    assert not [entry for entry in cache.glob("*") if entry.is_dir()]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"left_out": "layers.1.self_attn.q_proj"}, "lacks 1 tensors, such as .*1.*q_proj"),
        ({"blocks": 3}, "lacks 9 tensors"),
    ],
    ids=["one is missing", "a block is missing"],
)
def test_a_file_that_does_not_hold_all_weights_of_its_model_is_refused(
    make_model: Maker, tmp_path: Path, changed: dict[str, Any], message: str, cache: Path
) -> None:
    path = _write(make_model(), tmp_path / "part.gguf", **changed)
    with pytest.raises(ModelError, match=message):
        load_source(str(path))
    assert not [entry for entry in cache.glob("*") if entry.is_dir()]


def test_what_lies_beside_the_file_is_not_looked_at(make_model: Maker, gguf_file: Path, tmp_path: Path) -> None:
    alone = load_source(str(gguf_file)).tokenizer("Numbers are compared")["input_ids"]
    folder = tmp_path / "beside"
    shutil.copytree(make_model(), folder)
    other = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    other["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(other), encoding="utf-8")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    shutil.copy(gguf_file, folder / "small.gguf")
    shutil.rmtree(tmp_path / "cache")
    assert load_source(str(folder / "small.gguf")).tokenizer("Numbers are compared")["input_ids"] == alone


@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_a_converted_folder_that_was_damaged_is_made_again(
    gguf_file: Path, cache: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ensure_gguf_folder(str(gguf_file)) / "model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    if damage == "cut short":
        weights.write_bytes(before[: len(before) // 2])
    capsys.readouterr()
    assert ensure_gguf_folder(str(gguf_file)) == weights.parent
    assert weights.read_bytes() == before
    assert f"{weights.parent} is damaged (model.safetensors) and is made again." in capsys.readouterr().err
    for unusable in (b"", b"{}", b"[]"):  # as an interrupted copy of the cache may leave it
        (weights.parent / ".sizes.json").write_bytes(unusable)
        assert ensure_gguf_folder(str(gguf_file)) == weights.parent
        assert "is damaged (.sizes.json)" in capsys.readouterr().err


def test_what_a_killed_conversion_left_is_removed_by_a_later_one(gguf_file: Path, cache: Path) -> None:
    name = load_source(str(gguf_file)).folder.name
    shutil.rmtree(cache / name)
    left, recent = cache / f".{name}.old", cache / f".{name}.new"
    for folder in (left, recent):
        folder.mkdir()
    os.utime(left, (0, 0))
    load_source(str(gguf_file))
    assert not left.exists()
    assert recent.exists()


def test_without_the_package_that_reads_it_the_extra_is_named(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"small\.gguf needs gguf.*mobiq-lightning\[gguf\]"):
        load_source(str(gguf_file))


def test_other_files_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"is a file; give the folder of a Hugging Face model, or a \.gguf file"):
        load_source(str(path))
