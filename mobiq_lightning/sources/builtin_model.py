"""The built-in model: a small LLaMA trained on CPython's own documentation; nothing is downloaded.

Reading the text takes two to four seconds per process, training the model (once) one to two minutes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mobiq_lightning.console import verbosity
from mobiq_lightning.errors import ModelError
from mobiq_lightning.sources.builtin_text import builtin_documents
from mobiq_lightning.sources.model_files import cache_folder, make_once

_FORMAT_VERSION = 1  # part of the cache key; raise it with any change here that changes the trained model


@dataclass(frozen=True)
class BuiltinModelSpec:
    """Sizes and training of the built-in model: everything that decides it but the text and the seed.

    Args:
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        layers: Decoder blocks.
        heads: Attention heads.
        kv_heads: Key/value heads, each shared by a group of attention heads.
        vocabulary: Entries of the byte-level BPE, 256 bytes and 3 special tokens included.
        max_positions: `max_position_embeddings` of the model.
        steps: Optimizer steps.
        batch_tokens: Tokens per step.
        window: Tokens per training window in the first three quarters of the steps; short ones are cheaper.
        final_window: Tokens per training window in the rest; the model is not trained on longer text.
        lr: Peak AdamW learning rate of embeddings and norms.
        matrix_lr: Peak Muon learning rate of the linear layers.
        weight_decay: Decoupled weight decay of the linear layers.
        warmup: Share of the steps over which the learning rates rise; then they follow a cosine to zero.

    Raises:
        ModelError: If the numbers do not fit together.
    """

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 2048
    max_positions: int = 512
    steps: int = 720
    batch_tokens: int = 1024
    window: int = 128
    final_window: int = 256
    lr: float = 8e-3
    matrix_lr: float = 0.03
    weight_decay: float = 0.1
    warmup: float = 0.05

    def __post_init__(self) -> None:
        longest = max(self.window, self.final_window)
        rules = {
            "counts must be at least 1": min(v for v in asdict(self).values() if isinstance(v, int)) >= 1,
            "heads must be a multiple of kv_heads": self.heads % max(self.kv_heads, 1) == 0,
            "hidden_size must be a multiple of twice heads": self.hidden_size % max(2 * self.heads, 1) == 0,
            "vocabulary must be at least 259": self.vocabulary >= 259,
            "batch_tokens must be at most 16384": self.batch_tokens <= 16384,
            "windows must fit into max_positions": longest <= self.max_positions,
            "windows must fit into batch_tokens": longest <= self.batch_tokens,
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ModelError(f"Built-in model: {'; '.join(broken)}, but this is {self}")


def ensure_builtin_model(cache_dir: Path | None = None, seed: int = 0, spec: BuiltinModelSpec | None = None) -> Path:
    """Gives the folder with the built-in model, which is trained on the CPU first if the cache does not have it.

    The model is an ordinary Hugging Face LLaMA in float32, with its tokenizer. The caller's random state, default
    dtype, device and threads stay as they are. Same seed, spec and text give the same bits on the same machine.

    Args:
        cache_dir: Base of the cache; by default the environment variable ``MOBIQ_CACHE`` or the user's cache.
        seed: Seed of the initial weights and of the order of the text.
        spec: Sizes and training; by default ``BuiltinModelSpec()``, one to two minutes on one core.

    Raises:
        DataError: If this Python has no standard library sources to read the text from.
        ModelError: If the cache cannot be written.
    """
    spec = spec or BuiltinModelSpec()
    base = cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
    target = base / f"llama-{_cache_key(seed, spec)}"
    try:
        make_once(target, lambda folder: _build(folder, seed, spec))
    except OSError as error:
        raise ModelError(
            f"Cannot write the built-in model to {target.parent} ({error}). Point the environment variable "
            "MOBIQ_CACHE to a folder that can be written and has 10 MB left"
        ) from error
    return target


def _cache_key(seed: int, spec: BuiltinModelSpec) -> str:
    text = hashlib.sha256("\0".join(builtin_documents("train")).encode()).hexdigest()
    torch_version = version("torch").split(".")[:2]  # importing torch takes seconds
    key = json.dumps([_FORMAT_VERSION, text, torch_version, seed, asdict(spec)], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _build(folder: Path, seed: int, spec: BuiltinModelSpec) -> None:
    """Trains the model and writes it into a folder."""
    documents = builtin_documents("train")
    tokenizer = _train_tokenizer(documents, spec)
    streams = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(documents)["input_ids"]]
    _train_model(streams, tokenizer, seed, spec).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_tokenizer(documents: list[str], spec: BuiltinModelSpec) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=list(names.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    tokenizer: Any = PreTrainedTokenizerFast
    return tokenizer(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **names)


def _train_model(streams: list[list[int]], tokenizer: Any, seed: int, spec: BuiltinModelSpec) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with _isolated(seed):
        model: Any = LlamaForCausalLM(config)
        _optimize(model, _batches(streams, seed, spec), spec)
    return model.eval()


def _optimize(model: Any, batches: Iterator[Any], spec: BuiltinModelSpec) -> None:
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in n]
    # In the same wall time this reaches a lower perplexity than AdamW for all.
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=spec.matrix_lr, weight_decay=spec.weight_decay),
        torch.optim.AdamW(others, lr=spec.lr, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    schedules = [LambdaLR(o, lambda s: _schedule(s, spec)) for o in optimizers]
    bar = tqdm(
        batches,
        "Training the built-in model (once)",
        spec.steps,
        mininterval=1.0,
        unit="step",
        disable=verbosity() == "quiet",
    )
    for ids in bar:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss: Any = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _schedule(step: int, spec: BuiltinModelSpec) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero."""
    warmup = spec.warmup * spec.steps
    cosine = 0.5 + 0.5 * math.cos(math.pi * max(0.0, step - warmup) / max(1.0, spec.steps - warmup))
    return min(1.0, (step + 1) / max(1.0, warmup)) * cosine


def _batches(streams: list[list[int]], seed: int, spec: BuiltinModelSpec) -> Iterator[Any]:
    """(B, window + 1) int64 batches, one per step; each pass over the text has its own order and offset."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    short = spec.steps * 3 // 4
    for window, steps in ((spec.window, short), (spec.final_window, spec.steps - short)):
        rows, left = spec.batch_tokens // window, steps
        while left > 0:
            shuffled = torch.randperm(len(streams), generator=generator).tolist()
            text = torch.tensor([token for i in shuffled for token in streams[i]])
            offset = int(torch.randint(window, (1,), generator=generator))
            windows = text[offset:].unfold(0, window + 1, window)
            order = torch.randperm(len(windows), generator=generator)
            for batch in range(min(left, len(windows) // rows)):
                yield windows[order[batch * rows : (batch + 1) * rows]]
            left -= len(windows) // rows


@contextlib.contextmanager
def _isolated(seed: int) -> Iterator[None]:
    """Context with CPU, one thread, float32, gradients and the given seed; the caller's settings are put back."""
    import torch

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        # Operators this small gain little from more threads, and stall where other processes want the cores;
        # and with one thread the bits do not depend on the number of cores.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the caller's GPUs as well
        yield
