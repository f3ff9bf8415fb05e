"""Source models in a GGUF file: turned into an ordinary folder, once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mobiq_lightning.console import say
from mobiq_lightning.errors import FileError, ModelError
from mobiq_lightning.extras import require
from mobiq_lightning.input_files import open_regular
from mobiq_lightning.sources.model_files import cache_folder, kept_sha256, make_once

_MAGIC = b"GGUF"
_ALONE = "model.gguf"
_FORMAT_VERSION = 2  # part of the cache key; raise it with any change here that changes the folder


def is_gguf(pretrained: str) -> bool:
    """Whether the name of a model is that of a GGUF file; it need not be there."""
    return pretrained.lower().endswith(".gguf") and not Path(pretrained).expanduser().is_dir()


def check_gguf(pretrained: str) -> Path:
    """The GGUF file that the name of a model means.

    Raises:
        ModelError: If it is not there, or is none.
    """
    path = Path(pretrained).expanduser()
    try:
        with open_regular(path) as file:
            magic = file.read(len(_MAGIC))
    except FileError as error:
        raise ModelError(f"model.pretrained: {error}") from error
    if magic != _MAGIC:
        raise ModelError(
            f"model.pretrained: {path} is no GGUF file (it begins with {magic!r}); the download may be damaged"
        )
    return path


def ensure_gguf_folder(pretrained: str) -> Path:
    """Gives the folder with the model of a GGUF file, which is made of it first if the cache does not have it.

    The folder is an ordinary Hugging Face model with its tokenizer, its weights as transformers dequantizes them, float32:
    4 bytes a parameter on the disk and, this once, in memory. Everything after it is as with any other folder.

    Args:
        pretrained: Path of the file. It must hold the whole model: files that are split are to be merged first.

    Raises:
        MissingExtraError: If the package that reads GGUF is not installed.
        ModelError: If the file is damaged, of an architecture that transformers cannot read from GGUF, or the cache
            cannot be written.
    """
    path = check_gguf(pretrained)
    require("gguf", f"model.pretrained: {path.name}")
    target = cache_folder() / f"gguf-{_cache_key(path)}"
    try:
        make_once(target, lambda folder: _convert(path, folder))
    except OSError as error:
        raise ModelError(
            f"model.pretrained: {path.name} cannot be turned into a folder below {target.parent} ({error}). It takes 4 bytes "
            "for each parameter; point the environment variable MOBIQ_CACHE to a folder that has so much left"
        ) from error
    return target


def _cache_key(path: Path) -> str:
    """Of the bytes of the file, and of the rules by which a folder is made of them."""
    return hashlib.sha256(f"{_FORMAT_VERSION} {kept_sha256(path)}".encode()).hexdigest()[:16]


def _convert(path: Path, folder: Path) -> None:
    """Writes the model of a GGUF file into a folder."""
    for part in _read(path):
        part.save_pretrained(folder)


def _read(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"Turning {path.name} into an ordinary folder (once) ...")
    try:
        # Alone in a folder: transformers would take a tokenizer, or adapters, of whatever model lies beside it.
        with TemporaryDirectory() as alone:
            (Path(alone) / _ALONE).symlink_to(path.resolve())
            read, found = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=_ALONE, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=_ALONE, trust_remote_code=False)
    except Exception as error:  # of whatever kind: that is what a damaged file makes of transformers
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(
            f"model.pretrained: transformers cannot read {path} ({type(error).__name__}: {reason}). Give the folder of the "
            "model that it was made of, if there is one"
        ) from error
    _check_whole(path, found["missing_keys"], found["unexpected_keys"])
    # transformers does not save a model that says it is quantized, and this one no longer is.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model, tokenizer


def _check_whole(path: Path, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Makes sure that the file holds the weights of the model that it describes: transformers makes up those that are missing.

    Raises:
        ModelError: If it does not.
    """
    for names, what in ((missing, "lacks"), (unexpected, "has no place for")):
        if names:
            raise ModelError(
                f"model.pretrained: {path} describes a model whose weights it does not hold as they are: it {what} {len(names)} "
                f"tensors, such as {min(names)}. If it is one of several files, merge them (llama-gguf-split --merge); else "
                "download it again, or give the folder of the model that it was made of"
            )
