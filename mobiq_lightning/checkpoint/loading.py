"""Loads an elastic checkpoint as a transformers model, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mobiq_lightning.checkpoint.check import describe_problems
from mobiq_lightning.checkpoint.contents import read_contents
from mobiq_lightning.checkpoint.keywords import (
    CONFIG_KEYWORDS,
    HUB_KEYWORDS,
    check_kinds,
    checked_keywords,
    refuse_unknown,
)
from mobiq_lightning.checkpoint.load_call import LoadCall, answering, current_call
from mobiq_lightning.checkpoint.named_classes import router_class
from mobiq_lightning.errors import BitsError, CheckpointError, MobiqError
from mobiq_lightning.nn import held_slices
from mobiq_lightning.runs import CONFIG, ELASTIC

_ADVICE = "A finished `fit` leaves a checkpoint in <run folder>/elastic"


def load(
    source: str | Path,
    *,
    max_bits: int | None = None,
    bits: float | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    check_hashes: bool = True,
    warm_up: bool = False,
    trust_router: str | None = None,
    **kwargs: Any,
) -> Any:
    """Loads an elastic checkpoint as a transformers model whose bits per weight can be set at any time.

    Nothing of the checkpoint is executed. Its files are compared with each other and with hashes.json first.

    Args:
        source: A run folder, the ``elastic`` folder in it, or a Hugging Face hub id.
        max_bits: Depth in bits up to which planes are read, by default all; the model then runs at no more bits.
        bits: Bits per weight that the dial is set to; by default the checkpoint's ``default_bits``.
        dtype: dtype of what is not sliced, and of the computation; ``auto`` as saved.
        device: Device that the model is moved to; not together with `device_map`.
        check_hashes: Whether every file and every tensor that is read is compared with hashes.json; that costs one pass
            over the bytes.
        warm_up: Whether to compile every kernel that the model can need, and to unpack the weights that the reference
            path keeps, now instead of at the first requests.
        trust_router: Dotted path of the checkpoint's router if it is none of `mobiq_lightning.strategies`. That class is
            imported and run; by default only routers of this package are.
        **kwargs: Further arguments of `AutoModelForCausalLM.from_pretrained`: ``revision``, ``cache_dir``, ``token``,
            ``subfolder`` and others of the hub, ``device_map``, ``attn_implementation``, or keys of config.json. Those that
            an elastic checkpoint cannot honour are refused.

    Returns:
        The transformers model in eval mode, which is an `ElasticModel` as well as of its own class.

    Raises:
        CheckpointError: If there is no elastic checkpoint, or anything of it is missing, left over or damaged, or an argument
            cannot be honoured.
        BitsError: If `max_bits` is no prefix of the slices, or `bits` is out of range.
    """
    given = checked_keywords({**kwargs, "dtype": dtype, "device": device})
    check_kinds(max_bits=max_bits, check_hashes=check_hashes, warm_up=warm_up, trust_router=trust_router)
    path = resolve(source, **{name: given.pop(name) for name in HUB_KEYWORDS if name in given})
    with answering(LoadCall(check_hashes, trust_router or current_call().trust_router, path)):
        model = _load(path, max_bits, given)
    if device is not None:
        model.to(device)
    if bits is not None:
        model.set_bits(bits)
    model.eval()
    if warm_up:
        from mobiq_lightning.runtime import warm_up as run_once

        run_once(model)
    return model


def _load(path: Path, max_bits: int | None, given: dict[str, Any]) -> Any:
    """Loads the checkpoint in a folder; `given` are arguments of `from_pretrained`, and keys of config.json."""
    contents = read_contents(path, current_call().check_hashes)  # before transformers makes anything of config.json
    contents.require_whole()
    elastic = contents.elastic
    router_class(elastic.router["class_path"])
    held = elastic.max_bits
    if max_bits is not None:
        held_slices(tuple(elastic.slice_bits), max_bits)
    if max_bits is not None and held is not None and max_bits > held:
        raise BitsError(f"max_bits ({max_bits}) is more than the {held} bits that {path} holds")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        refuse_unknown(given, config.to_dict())
        for name in [name for name in given if name in CONFIG_KEYWORDS]:
            setattr(config, name, given.pop(name))
        stored = contents.config["quantization_config"]
        config.quantization_config = {**stored, "max_bits": held if max_bits is None else max_bits}
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, output_loading_info=True, trust_remote_code=False, **given
        )
    except MobiqError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{path} cannot be loaded: {type(error).__name__}: {said}") from error
    problems = [f"{key.replace('_', ' ')}: {name}" for key, names in info.items() for name in sorted(map(str, names))]
    if problems:
        raise CheckpointError(describe_problems(path, problems))
    return model


def resolve(source: str | Path, **hub: Any) -> Path:
    """Finds the folder of an elastic checkpoint; one on the hub is downloaded if it is not in the cache yet.

    Args:
        source: A run folder, an elastic checkpoint, or a Hugging Face hub id.
        **hub: Arguments of `from_pretrained` that say what is downloaded: ``revision``, ``subfolder``, ``token`` and others.

    Raises:
        CheckpointError: If there is no elastic checkpoint.
    """
    if not isinstance(source, (str, Path)) or not str(source).strip():
        raise CheckpointError(f"{source!r} names no elastic checkpoint; give a folder or a hub id. {_ADVICE}")
    subfolder = hub.pop("subfolder", "") or ""
    if not isinstance(subfolder, str):
        raise CheckpointError(f"load: subfolder ({subfolder!r}) should be the name of a folder")
    path = Path(source).expanduser()
    try:
        found = next((p for p in (path / ELASTIC / subfolder, path / subfolder) if (p / CONFIG).is_file()), None)
        exists = path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds what names cannot
        raise CheckpointError(f"{source!r} can be no folder ({error}). {_ADVICE}") from error
    if found is not None:
        if hub.get("revision") is not None:
            raise CheckpointError(f"{source} is a folder here and has no revisions; leave out revision")
        return found
    if exists or path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise CheckpointError(
            f"{source} holds no elastic checkpoint; a finished `fit` leaves one in <run folder>/elastic"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), **hub)) / subfolder
    except Exception as error:
        raise CheckpointError(
            f"{source} is neither a folder with an elastic checkpoint, nor in the local cache, nor reachable on the hub "
            f"({type(error).__name__}). {_ADVICE}"
        ) from error


def load_tokenizer(folder: str | Path) -> Any:
    """Loads the tokenizer of a checkpoint.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        CheckpointError: If it has none, or a damaged one.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {said[:160]}). Put the tokenizer files of the "
            "source model there"
        ) from error
