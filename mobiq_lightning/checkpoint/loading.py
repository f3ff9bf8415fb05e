"""Loads an elastic checkpoint as a transformers model, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mobiq_lightning.checkpoint.check import describe_problems
from mobiq_lightning.checkpoint.format import QUANT_METHOD, ElasticFormat, is_elastic
from mobiq_lightning.errors import CheckpointError, MobiqError
from mobiq_lightning.runs import CONFIG, ELASTIC


def load(
    source: str | Path,
    *,
    max_bits: int | None = None,
    bits: float | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    check_hashes: bool = True,
    warm_up: bool = False,
    **kwargs: Any,
) -> Any:
    """Loads an elastic checkpoint as a transformers model whose bits per weight can be set at any time.

    Args:
        source: A run folder, the ``elastic`` folder in it, or a Hugging Face hub id.
        max_bits: Depth in bits up to which planes are read, by default all; the model then runs at no more bits.
        bits: Bits per weight that the dial is set to; by default the checkpoint's ``default_bits``.
        dtype: dtype of what is not sliced, and of the computation; ``auto`` as saved.
        device: Device that the model is moved to; not together with `device_map`.
        check_hashes: Whether every tensor that is read is compared with hashes.json; that costs one pass over the
            bytes.
        warm_up: Whether to compile every kernel that the model can need, and to unpack the weights that the reference
            path keeps, now instead of at the first requests.
        **kwargs: Further arguments of `AutoModelForCausalLM.from_pretrained`, such as ``device_map``.

    Returns:
        The transformers model in eval mode, which is an `ElasticModel` as well as of its own class.

    Raises:
        CheckpointError: If there is no elastic checkpoint, or anything of it is missing, left over or damaged.
        BitsError: If `max_bits` is no prefix of the slices, or `bits` is out of range.
    """
    path = resolve(source)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path / CONFIG} cannot be read: {error}") from error
    stored = getattr(config, "quantization_config", None)
    if not is_elastic(stored):
        raise CheckpointError(f"{path} holds no elastic model (its quant_method is not {QUANT_METHOD!r})")
    held = ElasticFormat.from_json(stored).max_bits
    if max_bits is not None and held is not None and max_bits > held:
        raise CheckpointError(f"max_bits ({max_bits}) is more than the {held} bits that {path} holds")
    config.quantization_config = {**stored, "max_bits": max_bits or held, "check_hashes": check_hashes}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, **kwargs
        )
    except MobiqError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    problems = [f"{key.replace('_', ' ')}: {name}" for key, names in info.items() for name in sorted(map(str, names))]
    if problems:
        raise CheckpointError(describe_problems(path, problems))
    if device is not None:
        model.to(device)
    if bits is not None:
        model.set_bits(bits)
    model.eval()
    if warm_up:
        from mobiq_lightning.runtime import warm_up as run_once

        run_once(model)
    return model


def resolve(source: str | Path) -> Path:
    """Finds the folder of an elastic checkpoint; one on the hub is downloaded if it is not in the cache yet.

    Args:
        source: A run folder, an elastic checkpoint, or a Hugging Face hub id.

    Raises:
        CheckpointError: If there is no elastic checkpoint.
    """
    path = Path(source).expanduser()
    if (path / ELASTIC / CONFIG).is_file():
        return path / ELASTIC
    if (path / CONFIG).is_file():
        return path
    if path.exists() or path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise CheckpointError(
            f"{source} holds no elastic checkpoint; a finished `fit` leaves one in <run folder>/elastic"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source)))
    except Exception as error:
        raise CheckpointError(
            f"{source} is neither a folder with an elastic checkpoint, nor in the local cache, nor reachable on the hub "
            f"({type(error).__name__}). A finished `fit` leaves a checkpoint in <run folder>/elastic"
        ) from error
