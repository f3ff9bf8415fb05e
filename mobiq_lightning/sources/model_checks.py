"""What a source model must be: checks before and after transformers opens it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.errors import FileError, ModelError
from mobiq_lightning.input_files import read_mapping
from mobiq_lightning.sources.model_files import check_files, tensors_of, weight_files
from mobiq_lightning.sources.overflow import is_finite

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAPPINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_folder(folder: Path, pretrained: str) -> tuple[dict[str, Any], list[Path]]:
    """Checks what can be told of a model before transformers opens it.

    Args:
        folder: Folder of the model.
        pretrained: Its name in the recipe.

    Returns:
        What config.json holds, and the files with weights.

    Raises:
        ModelError: If the model is damaged, is an adapter, is quantized, or is of a kind that only code of its own knows.
    """
    from transformers import CONFIG_MAPPING

    check_files(folder)
    try:
        config = read_mapping(folder / "config.json")
        for name in _MAPPINGS:  # transformers goes on without some of them if they are damaged
            if (folder / name).exists():
                read_mapping(folder / name)
    except FileError as error:
        raise ModelError(f"model.pretrained: {error}") from error
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"model.pretrained: {folder} holds an adapter (adapter_config.json); merge it into its model, save that, and "
            "give the folder of the merged model"
        )
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ModelError(
            f"model.pretrained: {pretrained} is already quantized (quant_method {method}); slicing needs the "
            "16- or 32-bit model it was made from"
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        code = config.get("auto_map")
        own = (
            f" and comes with code of its own (auto_map: {json.dumps(code)[:120]}), which is never run" if code else ""
        )
        raise ModelError(
            f"model.pretrained: {folder} has model_type {kind!r}, which this transformers does not know{own}. Give a model "
            "of a kind that transformers knows, or update transformers if the kind is newer"
        )
    files = weight_files(folder, config)
    names, layers = list(tensors_of(files)), config.get("num_hidden_layers")
    if names and isinstance(layers, int) and layers > len(names):  # before so many are built
        raise ModelError(
            f"model.pretrained: {folder / 'config.json'} says num_hidden_layers {layers}, but the weights are only "
            f"{len(names)} tensors; the folder is damaged or incomplete"
        )
    return config, files


def check_loaded(model: Any, loading: dict[str, Any], folder: Path) -> None:
    """Refuses what transformers loads with a warning.

    Args:
        model: The loaded model.
        loading: What transformers says of it: missing_keys and unexpected_keys.
        folder: Where it comes from, for the message.

    Raises:
        ModelError: If weights are missing, layers are left over, or weights are no floating-point numbers.
    """
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ModelError(
            f"model.pretrained: {folder} lacks {len(missing)} of the weights that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}, ...); they would be random. The download may be incomplete"
        )
    left = sorted(k for k in loading["unexpected_keys"] if "layers." in k and k.endswith((".weight", ".bias")))
    if left:
        raise ModelError(
            f"model.pretrained: {folder} holds {len(left)} weights for which {type(model).__name__} has no place by its "
            f"config.json ({', '.join(left[:3])}, ...); config.json and weights are of different models"
        )
    other = next(((name, p.dtype) for name, p in model.named_parameters() if p.dtype not in _FLOATS), None)
    if other is not None:
        raise ModelError(
            f"model.pretrained: {folder}: {other[0]} is {other[1]}; slicing needs the 16- or 32-bit model it was made from"
        )


def check_special_tokens(tokenizer: Any, rows: int, name: str) -> None:
    """Refuses special tokens that the embedding has no row for; other tokens are looked at where text has them.

    Args:
        tokenizer: The tokenizer.
        rows: Rows of the model's embedding.
        name: Name of the model in the recipe.

    Raises:
        ModelError: Naming the token.
    """
    for kind in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if isinstance(number, int) and number >= rows:
            raise ModelError(
                f"model.pretrained: the {kind} token of {name}, {getattr(tokenizer, f'{kind}_token')!r}, has id {number}, but "
                f"the model's embedding has {rows} rows; tokenizer and model belong to different models"
            )


def check_finite(model: nn.Module, where: str, saved_dtype: str = "None") -> None:
    """Checks that no weight of a model is NaN or infinite: embedding, norms, head, linears and biases.

    Args:
        model: The model.
        where: What it is, for the message.
        saved_dtype: Name of the dtype that it was saved in, for the advice; ``None`` if unknown.

    Raises:
        ModelError: Naming the first weight that is, how many of its numbers, and how many other weights are.
    """
    broken = [(name, weight) for name, weight in _weights(model) if not is_finite(weight)]
    if not broken:
        return
    name, weight = broken[0]
    bad = int((~torch.isfinite(weight)).sum())
    others = f" (and so are numbers of {len(broken) - 1} other weights)" if len(broken) > 1 else ""
    advice = "The model is damaged: download it again, or repeat the training or conversion that made it"
    if weight.dtype == torch.float16 and saved_dtype not in ("None", "float16"):
        advice = f"It was saved in {saved_dtype}, and float16 ends at 65504: use model.dtype bfloat16 or float32"
    raise ModelError(f"{where}: {name}: {bad} of {weight.numel()} numbers are NaN or infinite{others}. {advice}")


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if weight.is_floating_point() and weight.numel():
            yield name, weight.detach()
