"""The source model: loading a LLaMA-family checkpoint, checking it, and putting sliced linears into its blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.errors import ModelError


@dataclass
class Source:
    """A loaded source model.

    Args:
        name: Name of the model in the recipe.
        model: Full-precision causal language model, frozen, in eval mode.
        tokenizer: Tokenizer of the model.
        tokenizer_hash: Hash that identifies the tokenizer in results.
        fingerprint: Hash that identifies the weights, of sizes and ends of the weight files.
        folder: Local folder with the files of the model.
        config_changes: Keys of config.json that have other values since a transform was folded into the weights; None if
            none was.
    """

    name: str
    model: Any
    tokenizer: Any
    tokenizer_hash: str
    fingerprint: str
    folder: Path
    config_changes: dict[str, Any] | None = None


def load_source(pretrained: str, dtype: str = "auto") -> Source:
    """Loads a causal language model and its tokenizer.

    Args:
        pretrained: Hub id, local folder, or ``builtin``.
        dtype: dtype of the weights: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ModelError: If the model cannot be reached, is quantized already, lacks weights, or does not fit its tokenizer.
    """
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = _resolve(pretrained, snapshot_download)
    try:
        config = AutoConfig.from_pretrained(folder)
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise ModelError(
                f"model.pretrained: {pretrained} is already quantized (quant_method {method}); slicing needs the "
                "16- or 32-bit model it was made from"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, low_cpu_mem_usage=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.pretrained: {folder} cannot be loaded: {_first_line(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ModelError(
            f"model.pretrained: {folder} lacks {len(missing)} of the weights that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}, ...); they would be random. The download may be incomplete"
        )
    _check_vocabulary(model, tokenizer, pretrained)
    model.eval().requires_grad_(False)
    return Source(pretrained, model, tokenizer, hash_tokenizer(tokenizer), fingerprint(folder), folder)


def _resolve(pretrained: str, snapshot_download: Callable[..., str]) -> Path:
    """Local folder of a model, downloaded if it is a hub id that is not in the cache yet."""
    if pretrained == "builtin":
        from mobiq_lightning.sources.builtin_model import ensure_builtin_model

        return ensure_builtin_model()
    path = Path(pretrained).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.pretrained: {path} has no config.json; give a Hugging Face model folder")
        return path
    if path.is_absolute() or pretrained.startswith(".") or pretrained.count("/") > 1:
        raise ModelError(f"model.pretrained: there is no folder {path.absolute()}")
    try:
        return Path(snapshot_download(pretrained, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except Exception as error:
        raise ModelError(
            f"model.pretrained: {pretrained!r} is neither a local folder, nor in the local cache, nor reachable on the "
            f"hub ({type(error).__name__}: {_first_line(error)}). Download it where there is a network and give the "
            "folder: --model.pretrained path/to/folder"
        ) from error


def _check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"model.pretrained: the tokenizer of {name} ({type(tokenizer).__name__}) has {len(tokenizer)} tokens, the "
            f"model's embedding {rows}; they belong to different models"
        )


def check_finite(model: nn.Module, linears: Sequence[str]) -> None:
    """Checks that the weights of linears hold neither NaN nor infinity.

    Args:
        model: Model that holds the linears.
        linears: Dotted paths of the linears to check.

    Raises:
        ModelError: If one does; the message names the first.
    """
    for name in linears:
        weight = model.get_submodule(name).weight
        if isinstance(weight, Tensor) and not bool(torch.isfinite(weight).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise ModelError(
                f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; the checkpoint is damaged"
            )


def hash_tokenizer(tokenizer: Any) -> str:
    """Computes the SHA-256 (first 16 hex digits) of a tokenizer's vocabulary, merges and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((text + repr(tokenizer.special_tokens_map)).encode()).hexdigest()[:16]


def fingerprint(folder: Path) -> str:
    """SHA-256 (first 16 hex digits) of config.json and of name, size, first and last MiB of every weight file."""
    sha = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            sha.update(f"{path.name} {size}".encode() + file.read(2**20))
            file.seek(max(0, size - 2**20))
            sha.update(file.read())
    return sha.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
