"""Small random models of every kind that the project must take, and a small text."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # of this process and those that it starts; must be set before torch is imported
    )

import pytest
import torch
from filelock import FileLock

from tests import interpreter, markers

SETTINGS = ("WANDB_", "HF_", "TRANSFORMERS_", "MOBIQ_", "SLURM_")
"""How variables begin that change what the package and its libraries do, whoever calls the tests."""
PLACES = ("HF_HOME", "HF_DATASETS_CACHE", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
"""Such variables that say no more than where files go: elsewhere it may not be possible to write."""
LAUNCHED = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "JSM_NAMESPACE_RANK", "PL_GLOBAL_SEED")
"""Variables with which launchers and Lightning tell a process what it is part of."""
for name in list(os.environ):
    if name in LAUNCHED or (name.startswith(SETTINGS) and name not in PLACES):
        del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_SILENT"] = "true"
torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 where other work runs beside
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # the kernels' own source, run on the CPU; must be set before Triton is imported
    )

TOPICS: dict[str, str] = pydoc_data.topics.topics


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests = [item for item in items if isinstance(item, pytest.Function)]
    for test in tests:
        markers.mark(test)
    config.stash[markers.COLLECTED] = tests
    if "PYTEST_XDIST_WORKER" in os.environ and len(tests) == len(items):
        items[:] = markers.costly_files_first(tests)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Takes back what a test and its fixtures leave in the environment: Lightning, W&B and others write there."""
    interpreter.quicken()
    before = dict(os.environ)
    try:
        return (yield)
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty help topics of Python as documents."""
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    documents = [TOPICS[name][:1500] for name in sorted(TOPICS)[:40]]
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


def make_tokenizer(vocabulary: int = 300) -> Any:
    """A byte-level BPE with BOS in front, as LLaMA's tokenizers have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TOPICS[name] for name in sorted(TOPICS)[:10]], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes folders with small random models; the same arguments give the same folder."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(
        kind: str = "llama", tied: bool = True, dtype: torch.dtype = torch.float32, sharded: bool = False, **extra: Any
    ) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

        key = (kind, tied, dtype, sharded, *sorted(extra.items()))
        if key in made:
            return made[key]
        tokenizer = make_tokenizer()
        config_class, model_class = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),  # has biases on q, k and v
        }[kind]
        config = config_class(
            vocab_size=len(tokenizer) + 4,  # embeddings are often padded; Qwen2 adds a token on load
            hidden_size=32,
            intermediate_size=44,  # no multiple of any group size
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
            **{"num_hidden_layers": 2, **extra},
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
                if parameter.ndim == 2:  # large enough that slicing shows in the logits
                    torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path_factory.mktemp("model")
        model.to(dtype).save_pretrained(folder, max_shard_size="20KB" if sharded else "5GB")
        tokenizer.save_pretrained(folder)
        made[key] = folder
        return folder

    return make


UNTIMED = "{class_path: mobiq_lightning.callbacks.LatencyCheck, init_args: {seconds: 0}}"
"""The callback that times the checkpoint of a run, which takes as long as a quarter of a small run, switched off."""


def small_recipe(model: Path, text_file: Path, folder: Path, timed: bool = False) -> list[str]:
    """A command line that calibrates a small model in seconds, in ``folder/run``."""
    return [
        "--config",
        str(Path(__file__).parents[1] / "recipes" / "tiny-ranges.yaml"),
        f"--model.pretrained={model}",
        f"--data.source={text_file}",
        f"--data.eval_source={text_file}",
        "--model.slices.init_args.group_size=16",
        "--model.epochs_per_block=2",
        "--model.stages=[{share: 0.5, train: [ranges, transforms]}, {share: 0.5, train: [ranges, transforms, routers]}]",
        "--model.eval_bits=[2, 2.5, 8]",
        "--model.random_seeds=[0]",
        "--data.n_samples=8",
        "--data.seq_len=32",
        "--data.batch_size=4",
        "--data.eval_seq_len=64",
        "--data.eval_max_windows=8",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={folder / 'run'}",
        *([] if timed else [f"--trainer.callbacks=[{UNTIMED}]"]),
    ]


@pytest.fixture
def recipe_arguments(make_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> list[str]:
    """A command line that calibrates a small model in seconds."""
    return small_recipe(make_model(), text_file, tmp_path)


Run = tuple[Path, list[str]]


@pytest.fixture(scope="session")
def finished(make_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run, its checkpoint timed, and the command line that made it. Not to be changed by tests."""
    from mobiq_lightning.cli import main

    # Of all processes that run tests the first one calibrates, and the others wait for it.
    of_process = tmp_path_factory.getbasetemp()
    folder = (of_process.parent if "PYTEST_XDIST_WORKER" in os.environ else of_process) / "finished"
    stored = folder / "arguments.json"
    with FileLock(f"{folder}.lock"):
        if not stored.exists():
            arguments = small_recipe(make_model(), text_file, folder, timed=True)
            assert main(["fit", *arguments]) == 0
            stored.write_text(json.dumps(arguments), encoding="utf-8")
    return folder / "run", json.loads(stored.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def model(finished: Run) -> Any:
    """The elastic model of that run; every test sets the dial itself."""
    import mobiq_lightning

    return mobiq_lightning.load(finished[0])


@pytest.fixture
def broken(finished: Run, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be broken."""
    return shutil.copytree(finished[0] / "elastic", tmp_path / "elastic")


def for_others(results: Path) -> Any:
    """What a run has measured, as its checkpoint says it: local files without the folder that they lie in."""
    from dataclasses import replace

    from mobiq_lightning.runs import read_results

    found = read_results(results)
    assert found.measured is not None
    return replace(found, measured=found.measured.without_places())
