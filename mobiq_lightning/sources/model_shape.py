"""What can be told of a source model without its weights: configuration, tokenizer, shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mobiq_lightning.errors import ModelError
from mobiq_lightning.sources.gguf import is_gguf
from mobiq_lightning.sources.model import hash_tokenizer, resolve
from mobiq_lightning.sources.model_checks import check_folder, check_special_tokens
from mobiq_lightning.sources.model_files import WEIGHT_PATTERNS


@dataclass
class ModelShape:
    """A source model on the meta device, which holds no numbers.

    Args:
        folder: Local folder with its files; None if there is none.
        model: The model; None if it cannot be made of its configuration.
        tokenizer: Its tokenizer; None if it cannot be loaded.
        tokenizer_hash: Hash that identifies the tokenizer.
        problems: What keeps it from being calibrated, a line each.
        notes: What a user may want to know, a line each.
    """

    folder: Path | None = None
    model: Any = None
    tokenizer: Any = None
    tokenizer_hash: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_shape(pretrained: str, dtype: str = "auto") -> ModelShape:
    """Reads what there is of a model without loading its weights, and collects what is wrong with it.

    Of a model on the hub configuration and tokenizer are fetched, not the weights.

    Args:
        pretrained: Hub id, local folder, GGUF file, or ``builtin``.
        dtype: dtype of the weights: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
    """
    found = ModelShape()
    try:
        found.folder = resolve(pretrained, with_weights=False)
    except ModelError as error:
        found.problems.append(str(error))
        return found
    local = Path(pretrained).expanduser().is_dir() or pretrained == "builtin" or is_gguf(pretrained)
    if not local and not any(any(found.folder.glob(pattern)) for pattern in WEIGHT_PATTERNS.values()):
        found.notes.append(f"the weights of {pretrained} are not in the local cache yet; `fit` downloads them")
    else:
        try:
            check_folder(found.folder, pretrained)
        except ModelError as error:
            found.problems.append(str(error))
    _read(found, pretrained, dtype)
    return found


def _read(found: ModelShape, pretrained: str, dtype: str) -> None:
    """Tokenizer and shapes, as far as they can be had; what cannot is a problem, once."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        found.tokenizer = AutoTokenizer.from_pretrained(found.folder, trust_remote_code=False)
        found.tokenizer_hash = hash_tokenizer(found.tokenizer)
    except Exception as error:  # noqa: BLE001 - of whatever kind: that is what a damaged file makes of transformers
        found.problems.append(f"model.pretrained: the tokenizer of {found.folder} cannot be loaded: {_line(error)}")
    try:
        config = AutoConfig.from_pretrained(found.folder, trust_remote_code=False)
        kind = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config, dtype=kind or torch.float32, trust_remote_code=False)
        found.model = made.requires_grad_(False)
    except Exception as error:  # noqa: BLE001
        if not found.problems:
            found.problems.append(f"model.pretrained: {found.folder} cannot be loaded: {_line(error)}")
        return
    if found.tokenizer is not None:
        try:
            rows = found.model.get_input_embeddings().num_embeddings
            check_special_tokens(found.tokenizer, rows, pretrained)
        except ModelError as error:
            found.problems.append(str(error))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
