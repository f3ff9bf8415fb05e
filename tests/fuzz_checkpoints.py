"""The readers of a checkpoint's files, as `fuzz_readers` has those of all others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save
from transformers import LlamaConfig, LlamaForCausalLM

import mobiq_lightning
from mobiq_lightning.checkpoint import export, summarize_checkpoint, verify
from mobiq_lightning.checkpoint.check import hash_tensor
from mobiq_lightning.checkpoint.write import write_hashes
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.files import sha256
from mobiq_lightning.runs import CONFIG, HASHES, INDEX
from tests.checkpoints import logits, write_checkpoint
from tests.fuzz_readers import Reader
from tests.fuzzing import as_json, mutate

COST = 20
"""How many times as long loading a checkpoint takes as reading a recipe."""


def checkpoint_readers(folder: Path, make_tokenizer: Callable[[], Any]) -> list[Reader]:
    """All readers of a checkpoint, with a valid one written into a new folder.

    With hashes as they were written nothing that differs may be accepted: then `load` and `export` end with an error that is
    none of the package's. With hashes made to fit, only what cannot be the files of a model must be refused.
    """
    checkpoint = _sample(folder, make_tokenizer())
    loaded = mobiq_lightning.load(checkpoint)
    expected = {bits: logits(loaded, bits) for bits in (2, 3.3, 8)}

    def load_it(folder: Path) -> None:
        model = mobiq_lightning.load(folder)
        if any(not torch.equal(logits(model, bits), value) for bits, value in expected.items()):
            raise AssertionError("accepted in silence, and computes something else")

    def export_it(folder: Path) -> None:
        copy = folder.parent / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        export(folder, copy)
        if verify(copy):
            raise AssertionError("exported damage")

    ways: dict[str, Callable[[Path], object]] = {
        "load": load_it,
        "verify": _verify,
        "inspect": summarize_checkpoint,
        "export": export_it,
    }
    refitted: dict[str, Callable[[Path], object]] = {"load": _load, "verify": _verify, "inspect": summarize_checkpoint}
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    found: list[Reader] = []
    for way, read in ways.items():
        found += [Reader(f"{way}, {file}", checkpoint, file, read, cost=COST) for file in (CONFIG, INDEX, HASHES)]
        found += [HeaderReader(f"{way}, header", checkpoint, name, read, cost=COST) for name in shards[::2]]
    for way, read in refitted.items():
        found.append(
            Reader(f"{way}, {CONFIG} with its hash", checkpoint, CONFIG, _after(_refit_files, read), cost=COST)
        )
        found.append(ValueReader(f"{way}, values with hashes", checkpoint, shards[-1], _after(_refit, read), cost=COST))
    return found


@dataclass(frozen=True)
class HeaderReader(Reader):
    """Reads a shard, of which the header is mutated, half of the time as the JSON that it is."""

    def inputs(self, random: Random, count: int) -> Iterator[bytes]:
        """Mutants of the shard."""
        content = (self.folder / self.file).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header, tensors = json.loads(content[8:end]), content[end:]
        for _ in range(count):
            if random.random() < 0.5:
                changed = as_json(mutate(header, random)).encode("utf-8", "surrogatepass")
                yield len(changed).to_bytes(8, "little") + changed + tensors
            else:
                yield mutate(content[:end], random) + tensors


@dataclass(frozen=True)
class ValueReader(Reader):
    """Reads a shard of which one value is another, such as a threshold, a weight of a router or a norm."""

    def inputs(self, random: Random, count: int) -> Iterator[bytes]:
        """Mutants of the shard."""
        tensors = load((self.folder / self.file).read_bytes())
        names = [name for name, value in tensors.items() if value.is_floating_point()]
        for _ in range(count):
            name = random.choice(names)
            changed = tensors[name].clone()
            at = random.randrange(changed.numel())
            changed.view(-1)[at] = random.choice([float("nan"), float("inf"), -1e30, 0.0, -1.0, 1e4])
            yield save({**tensors, name: changed}, metadata={"format": "pt"})


def _sample(folder: Path, tokenizer: Any) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer) + 4, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    return write_checkpoint(folder / "source", folder / "elastic")


def _load(folder: Path) -> None:
    mobiq_lightning.load(folder)


def _verify(folder: Path) -> None:
    if problems := verify(folder):
        raise CheckpointError("\n".join(problems))


def _after(change: Callable[[Path], None], read: Callable[[Path], object]) -> Callable[[Path], object]:
    def both(folder: Path) -> object:
        change(folder)
        return read(folder)

    return both


def _refit_files(folder: Path) -> None:
    """Makes the hashes of files fit, whatever they hold by now."""
    hashes = json.loads((folder / HASHES).read_text())
    write_hashes(folder, hashes["tensors"], {name: sha256(folder / name) for name in hashes["files"]})


def _refit(folder: Path) -> None:
    """Makes the hashes of tensors fit."""
    hashes = json.loads((folder / HASHES).read_text())
    paths = sorted(folder.glob("*.safetensors"))
    tensors = {name: hash_tensor(value) for path in paths for name, value in _tensors(path, path.stat().st_mtime_ns)}
    write_hashes(folder, tensors, hashes["files"])


@cache
def _tensors(path: Path, changed: int) -> list[tuple[str, torch.Tensor]]:
    return list(load(path.read_bytes()).items())
