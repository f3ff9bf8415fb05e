"""The built-in text and model; the model is a far smaller one here, trained for a few steps."""

from __future__ import annotations

import inspect
import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobiq_lightning.errors import DataError, ModelError
from mobiq_lightning.sources import builtin_model as builtin
from mobiq_lightning.sources.builtin_model import BuiltinModelSpec, ensure_builtin_model
from mobiq_lightning.sources.builtin_text import builtin_documents, read_splits

TINY = BuiltinModelSpec(
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=4,
    kv_heads=2,
    vocabulary=300,
    max_positions=64,
    steps=6,
    batch_tokens=64,
    window=16,
    final_window=32,
)


@pytest.fixture(scope="module")
def excerpt() -> Iterator[None]:
    """A twentieth of the text, so that tokenizing does not take longer than training."""
    few = builtin_documents("train")[::20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, "builtin_documents", lambda split: few)
        yield


@pytest.fixture(scope="module")
def folder(excerpt: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_builtin_model(tmp_path_factory.mktemp("cache"), spec=TINY)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_splits_are_disjoint_and_large_enough() -> None:
    train, heldout = builtin_documents("train"), builtin_documents("heldout")
    assert not set(train) & set(heldout)
    assert sum(map(len, train)) > 500_000
    assert 0.03 < sum(map(len, heldout)) / sum(map(len, train)) < 0.15
    assert min(map(len, train + heldout)) >= 200


def test_heldout_documents_do_not_repeat_training_text() -> None:
    joined = "\n".join(builtin_documents("train"))
    assert not [text for text in builtin_documents("heldout") if text in joined]


def test_documents_are_the_same_in_every_process(tmp_path: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    for part in ("pydoc_data", "email", "json"):  # enough text, read in a moment
        shutil.copytree(library / part, tmp_path / part)
    code = "import json, pathlib, sys; from mobiq_lightning.sources.builtin_text import read_splits; "
    command = [sys.executable, "-c", f"{code}print(json.dumps(read_splits(pathlib.Path(sys.argv[1]))))", str(tmp_path)]
    shown = [
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert shown[0] == shown[1]
    assert all(len(documents) > 5 for documents in json.loads(shown[0]).values())


def test_documents_are_those_of_the_standard_library() -> None:
    topics = max(pydoc_data.topics.topics.values(), key=len)
    assert inspect.cleandoc(topics).strip() in {*builtin_documents("train"), *builtin_documents("heldout")}


def test_callers_may_change_the_list_they_get() -> None:
    builtin_documents("heldout").clear()
    assert builtin_documents("heldout")


def test_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="'train' and 'heldout'"):
        builtin_documents("test")  # type: ignore[arg-type]


def test_python_without_sources_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"standard library, but {tmp_path} holds only 0 characters"):
        read_splits(tmp_path)


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(folder: Path, tmp_path: Path) -> None:
    assert weights(ensure_builtin_model(tmp_path, spec=TINY)) == weights(folder)
    assert weights(ensure_builtin_model(tmp_path, seed=1, spec=TINY)) != weights(folder)


def test_second_call_does_not_train_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_build", lambda *_: pytest.fail("trained again"))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert ensure_builtin_model(folder.parent, spec=TINY) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_model_is_an_ordinary_llama_with_grouped_queries_and_tied_embeddings(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert config.model_type == "llama"
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (folder / "generation_config.json").is_file()
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_tokenizer_puts_bos_in_front_and_gives_the_text_back(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Don't panic : naïve  text\n\twith ünïcode, 漢字 and 🙂 ."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == AutoModelForCausalLM.from_pretrained(folder).config.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_training_leaves_the_callers_state_alone_and_ignores_it(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            other = ensure_builtin_model(tmp_path, spec=TINY)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert weights(other) == weights(folder)


def test_interrupted_training_leaves_nothing_that_would_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ensure_builtin_model(tmp_path, spec=TINY)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (ensure_builtin_model(tmp_path, spec=TINY) / "model.safetensors").is_file()


def test_leftovers_of_a_killed_process_are_not_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / f".{folder.name}.0123").mkdir()
    assert weights(ensure_builtin_model(tmp_path, spec=TINY)) == weights(folder)


def test_model_that_another_process_finished_first_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = tmp_path / folder.name

    def finish_first(file: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "theirs").touch()

    monkeypatch.setattr(os, "fsync", finish_first)
    assert ensure_builtin_model(tmp_path, spec=TINY) == target
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [target]


def test_concurrent_callers_train_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path, *_: object) -> None:
        built.append(folder)
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(builtin, "_build", build)
    callers = [threading.Thread(target=ensure_builtin_model, args=(tmp_path, 0, TINY)) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(built) == 1


def test_environment_variable_moves_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOBIQ_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(builtin, "_build", lambda *_: None)
    assert ensure_builtin_model(spec=TINY).parent == tmp_path / "elsewhere"


def test_cache_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="MOBIQ_CACHE"):
        ensure_builtin_model(tmp_path / "file", spec=TINY)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"hidden_size": 100}, "hidden_size"),
        ({"vocabulary": 200}, "vocabulary"),
        ({"final_window": 1024}, "max_positions"),
        ({"batch_tokens": 200}, "batch_tokens"),
        ({"batch_tokens": 10**6}, "batch_tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        BuiltinModelSpec(**changes)  # type: ignore[arg-type]


def test_importing_the_module_imports_nothing_heavy() -> None:
    code = "import sys, mobiq_lightning.sources.builtin_model; print({'torch', 'transformers', 'tokenizers'} & {*sys.modules})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"
