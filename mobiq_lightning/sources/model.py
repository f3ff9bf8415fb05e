"""The source model: loading a LLaMA-family checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mobiq_lightning.errors import ModelError
from mobiq_lightning.sources.gguf import ensure_gguf_folder, is_gguf
from mobiq_lightning.sources.model_checks import check_finite, check_folder, check_loaded, check_special_tokens
from mobiq_lightning.sources.model_files import OTHER_PATTERNS, WEIGHT_PATTERNS, check_local_model, fingerprint


@dataclass
class Source:
    """A loaded source model.

    Args:
        name: Name of the model in the recipe.
        model: Full-precision causal language model, frozen, in eval mode.
        tokenizer: Tokenizer of the model.
        tokenizer_hash: Hash that identifies the tokenizer in results.
        folder: Local folder with the files of the model.
        files: Files that its weights were read from; empty if they come from none.
        config_changes: Keys of config.json that have other values since a transform was folded into the weights; None if
            none was.
    """

    name: str
    model: Any
    tokenizer: Any
    tokenizer_hash: str
    folder: Path
    files: list[Path] = field(default_factory=list)
    config_changes: dict[str, Any] | None = None

    @property
    def n_embeddings(self) -> int:
        """Rows of the model's embedding, which the ids of all tokens that occur must stay below."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @cached_property
    def n_bytes(self) -> int | None:
        """Bytes of the files that its weights were read from; None if they come from none, or are gone since."""
        try:
            return sum(path.stat().st_size for path in self.files) or None
        except OSError:
            return None

    @cached_property
    def fingerprint(self) -> str:
        """Hash that identifies the weights: of config.json and of all bytes of the files that they were read from."""
        return fingerprint(self.folder, self.files) if self.files else ""


def load_source(pretrained: str, dtype: str = "auto") -> Source:
    """Loads a causal language model and its tokenizer. Code that comes with a model is never run.

    Args:
        pretrained: Hub id, local folder, GGUF file, or ``builtin``.
        dtype: dtype of the weights: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ModelError: If the model cannot be reached, is damaged in whatever way, is quantized already, lacks weights, holds
            weights that are NaN or infinite, or does not fit its tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = resolve(pretrained)
    saved, files = check_folder(folder, pretrained)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            low_cpu_mem_usage=True,
            trust_remote_code=False,
            weights_only=True,
        )
    except Exception as error:  # of whatever kind: that is what a damaged file makes of transformers
        raise ModelError(f"model.pretrained: {folder} cannot be loaded: {_reason(error)}") from error
    check_loaded(model, loading, folder)
    check_special_tokens(tokenizer, model.get_input_embeddings().num_embeddings, pretrained)
    check_finite(model, f"model.pretrained: {pretrained}", str(saved.get("dtype") or saved.get("torch_dtype")))
    model.eval().requires_grad_(False)
    return Source(pretrained, model, tokenizer, hash_tokenizer(tokenizer), folder, files)


def resolve(pretrained: str, with_weights: bool = True) -> Path:
    """Local folder of a model, downloaded if it is a hub id that is not in the cache yet.

    Args:
        pretrained: Hub id, local folder, GGUF file, or ``builtin``.
        with_weights: Whether weights are downloaded too, and not configuration and tokenizer alone.

    Raises:
        ModelError: If there is no such model.
    """
    if pretrained == "builtin":
        from mobiq_lightning.sources.builtin_model import ensure_builtin_model

        return ensure_builtin_model()
    if is_gguf(pretrained):
        return ensure_gguf_folder(pretrained)
    if (local := check_local_model(pretrained)) is not None:
        return local
    from huggingface_hub import snapshot_download

    try:
        folder = Path(pretrained)
        if not with_weights:
            return Path(snapshot_download(pretrained, allow_patterns=OTHER_PATTERNS))
        for pattern in WEIGHT_PATTERNS.values():  # the second form of the weights only if the first is not there
            folder = Path(snapshot_download(pretrained, allow_patterns=[*OTHER_PATTERNS, pattern]))
            if any(folder.glob(pattern)):
                break
        return folder
    except Exception as error:
        raise ModelError(
            f"model.pretrained: {pretrained!r} is neither a local folder, nor in the local cache, nor reachable on the "
            f"hub ({type(error).__name__}: {_first_line(error)}). Download it where there is a network and give the "
            "folder: --model.pretrained path/to/folder"
        ) from error


def hash_tokenizer(tokenizer: Any) -> str:
    """Computes the SHA-256 (first 16 hex digits) of a tokenizer's vocabulary, merges and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((text + repr(tokenizer.special_tokens_map)).encode()).hexdigest()[:16]


def _reason(error: Exception) -> str:
    """Why a model could not be loaded, in a line, with the kind of the error where its text alone may say little."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own (auto_map), which is never run; give a model of a kind that transformers knows"
    text = _first_line(error)
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
