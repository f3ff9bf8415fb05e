"""Loading and checking source models."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from mobiq_lightning.errors import ModelError, RunFolderError
from mobiq_lightning.nn import BlockLayout, CalibratedBlock, SlicedLinear
from mobiq_lightning.runs import check_identity
from mobiq_lightning.sources import check_finite, former_fingerprint, load_source, model_files
from mobiq_lightning.sources.model_files import fingerprint, weight_files
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


def test_tokens_that_no_text_uses_may_lie_beyond_the_embedding(make_model: Maker, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model(), tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<x{i}>" for i in range(8)]})
    tokenizer.save_pretrained(folder)
    source = load_source(str(folder))
    assert len(source.tokenizer) > source.n_embeddings == 304


@pytest.mark.parametrize("kind", ["bos", "eos", "pad"])
def test_a_special_token_beyond_the_embedding_is_named(make_model: Maker, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(make_model(), tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<x{i}>" for i in range(8)])
    tokenizer.add_special_tokens({f"{kind}_token": "<x7>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=rf"the {kind} token of .*, '<x7>', has id 307, but .* 304 rows"):
        load_source(str(folder))


def test_missing_weights_are_refused_instead_of_made_up(make_model: Maker, tmp_path: Path) -> None:
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


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
def test_a_number_that_is_not_finite_is_found_in_any_weight(
    make_model: Maker, tmp_path: Path, name: str, value: float
) -> None:
    folder = shutil.copytree(make_model(kind="qwen2", tied=False), tmp_path / "m")
    edit_weights(folder, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    with pytest.raises(
        ModelError, match=rf": {re.escape(name)}: 1 of \d+ numbers are NaN or infinite\. .*download it again"
    ):
        load_source(str(folder))


def test_a_weight_too_large_for_float16_is_told_from_damage(make_model: Maker, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model(dtype=torch.bfloat16), tmp_path / "m")
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"][:2].fill_(1e5))
    with pytest.raises(ModelError, match=r"model\.norm\.weight: 2 of 32 .*saved in bfloat16.*model\.dtype bfloat16"):
        load_source(str(folder), "float16")


def test_finite_weights_pass_and_all_that_are_not_are_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    check_finite(model, "it")
    for linear in model:
        linear.weight.data[0, 0] = float("nan")  # type: ignore[union-attr,index]
    with pytest.raises(ModelError, match=r"it: 0\.weight: 1 of 16 .* \(and so are numbers of 1 other weights\)"):
        check_finite(model, "it")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": None}, "model_type None"),
        ({"model_type": "made-up"}, "model_type 'made-up', which this transformers does not know"),
        ({"model_type": "made-up", "auto_map": {"AutoConfig": "evil.Config"}}, r"code of its own \(.*evil\.Config"),
        ({"num_hidden_layers": 10**6}, "says num_hidden_layers 1000000, but the weights are only 20 tensors"),
        ({"num_hidden_layers": 1}, "holds 9 weights for which LlamaForCausalLM has no place"),
        ({"num_hidden_layers": "two"}, "cannot be loaded"),
        ({"hidden_size": [32]}, "cannot be loaded"),
        ({"hidden_size": -1}, "cannot be loaded"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"vocab_size": 10**9}, "cannot be loaded"),
        ({"hidden_act": 3}, "cannot be loaded"),
        ({"hidden_act": "no such"}, "cannot be loaded"),
        ({"rope_parameters": 7}, "cannot be loaded"),
        ({"rope_parameters": {"rope_type": "linear"}}, "cannot be loaded"),
        ({"dtype": "float17"}, "cannot be loaded"),
        ({"transformers_weights": "../m/model.safetensors"}, "which lies elsewhere"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_a_damaged_config_is_one_line(make_model: Maker, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = shutil.copytree(make_model(), tmp_path / "m")
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=said) as caught:
        load_source(str(folder))
    assert "\n" not in str(caught.value)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])  # type: ignore[return-value]


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)  # type: ignore[return-value]


def pipe(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def index(weight_map: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        no_weights(folder)
        content = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return make


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_weights, "holds no weights"),
        (cut("model.safetensors"), "damaged or cut short"),
        (written("model.safetensors", b""), "damaged or cut short"),
        (written("model.safetensors", b"\xff" * 64), "damaged or cut short"),
        (pipe("model.safetensors"), "no regular file"),
        (pipe("tokenizer.json"), "no regular file"),
        (pipe("chat_template.jinja"), "no regular file"),
        (index({"a": "gone.safetensors"}), r"gone\.safetensors is missing; the download may be incomplete"),
        (index({"a": "../other.safetensors"}), r"names '\.\./other\.safetensors', which is no file beside it"),
        (index({"a": 3}), "names 3, which is no file beside it"),
        (index([]), "no index of weights"),
        (written("config.json", b"{"), "not valid JSON"),
        (written("config.json", b"[1]"), "holds list where a mapping is expected"),
        (written("config.json", "{}".encode("utf-16")), "not UTF-8"),
        (written("adapter_config.json", b"{}"), "holds an adapter"),
        (written("tokenizer.json", b"{}"), "cannot be loaded"),
        (written("tokenizer_config.json", b"[]"), "holds list where a mapping"),
        (written("generation_config.json", b"{"), "generation_config.*not valid JSON"),
        (no_tokenizer, "cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_one_line(
    make_model: Maker, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    folder = shutil.copytree(make_model(), tmp_path / "m")
    damage(folder)
    with pytest.raises(ModelError, match=said) as caught:
        load_source(str(folder))
    assert "\n" not in str(caught.value)


class Bomb:
    """Runs when it is unpickled by whoever does not look."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_pickled_weights_run_no_code_whatever_the_environment_says(
    make_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(make_model(), tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load_source(str(folder)).files == [folder / "pytorch_model.bin"]
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({**weights, "model.norm.weight": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_source(str(folder))
    assert not (tmp_path / "ran").exists()
    with pytest.warns(UserWarning, match="forcing weights_only=False"):
        torch.load(folder / "pytorch_model.bin")  # the bomb is one
    assert (tmp_path / "ran").exists()


def test_a_model_without_decoder_blocks_is_told_how_to_describe_its_layout() -> None:
    with pytest.raises(ModelError, match=r"model\.layout\.blocks \(lists in this model: 0\)"):
        BlockLayout().find(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])))


def weights_folder(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name in names:
        (folder / name).write_bytes(bytes(3 * 2**20))
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("position", [0, 2**20 + 7, -1])
def test_the_fingerprint_follows_every_byte_of_the_weights(tmp_path: Path, name: str, position: int) -> None:
    folder = weights_folder(tmp_path / "m", name)
    before = fingerprint(folder, weight_files(folder, {}))
    data = bytearray((folder / name).read_bytes())
    data[position] ^= 1
    (folder / name).write_bytes(data)
    assert fingerprint(folder, weight_files(folder, {})) != before


def test_the_fingerprint_covers_an_index_and_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    folder = weights_folder(tmp_path / "m", "one.bin", "two.bin", "training_args.bin")
    index = {"metadata": {}, "weight_map": {"a": "one.bin", "b": "two.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    files = weight_files(folder, {})
    assert [path.name for path in files] == ["pytorch_model.bin.index.json", "one.bin", "two.bin"]
    before = fingerprint(folder, files)
    (folder / "training_args.bin").write_bytes(b"")
    assert fingerprint(folder, files) == before
    (folder / "two.bin").write_bytes(b"")
    assert fingerprint(folder, files) != before


def test_weights_are_looked_for_as_transformers_does(tmp_path: Path) -> None:
    folder = weights_folder(tmp_path / "m", "pytorch_model.bin", "model.safetensors", "mine.safetensors")
    assert [path.name for path in weight_files(folder, {})] == ["model.safetensors"]
    named = weight_files(folder, {"transformers_weights": "mine.safetensors"})
    assert [path.name for path in named] == ["mine.safetensors"]


def test_the_hash_of_a_large_file_is_kept_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBIQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model_files, "HASHED_FROM", 1)
    monkeypatch.setattr(model_files, "_SETTLED_NS", -(10**12))
    folder = weights_folder(tmp_path / "m", "model.safetensors")
    files = [folder / "model.safetensors"]
    before = fingerprint(folder, files)
    kept = tmp_path / "cache" / "weight-hashes.json"
    entry = json.loads(kept.read_text())[str(files[0])]
    kept.write_text(json.dumps({str(files[0]): [*entry[:-1], "known"]}))
    assert fingerprint(folder, files) != before  # the kept hash was taken
    status = files[0].stat()
    files[0].write_bytes(bytes(3 * 2**20))
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # as if nothing had been written
    assert fingerprint(folder, files) == before
    kept.write_text("damaged")
    assert fingerprint(folder, files) == before


def test_a_run_of_an_earlier_version_goes_on_as_long_as_its_weights_are_the_same(tmp_path: Path) -> None:
    folder = weights_folder(tmp_path / "m", "model.safetensors")
    former = former_fingerprint(folder)
    (tmp_path / "identity.json").write_text(json.dumps({"source weights": former, "tokenizer": "t"}))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch-000000.ckpt").write_bytes(b"an epoch")
    now = {"source weights": fingerprint(folder, weight_files(folder, {})), "tokenizer": "t"}
    check_identity(tmp_path, now, lambda: {"source weights": former_fingerprint(folder)})
    (folder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(RunFolderError, match=f"source weights: {former} then"):
        check_identity(tmp_path, now, lambda: {"source weights": former_fingerprint(folder)})
