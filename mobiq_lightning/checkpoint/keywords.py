"""Which arguments of `from_pretrained` loading an elastic checkpoint honours, and why it refuses the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mobiq_lightning.errors import CheckpointError, nearest

HUB_KEYWORDS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
"""Arguments that say what is downloaded, and where to."""
_HONOURED = (
    "attn_implementation",
    "device_map",
    "disable_mmap",
    "dtype",
    "generation_config",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "tp_plan",
    "tp_size",
    "device_mesh",
)
"""Further arguments that are passed on as they are."""
CONFIG_KEYWORDS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "rope_parameters",
    "sliding_window",
    "use_cache",
)
"""Keys of config.json that say how a model is run, and not what it is."""
_REFUSED = {
    "config": "config.json of the checkpoint says what the model is",
    "quantization_config": "config.json of the checkpoint says how it is sliced; give max_bits, bits or check_hashes",
    "state_dict": "the weights are those of the checkpoint",
    "output_loading_info": "a checkpoint is loaded whole or not at all, so there is nothing to tell",
    "ignore_mismatched_sizes": "a checkpoint is loaded whole or not at all",
    "gguf_file": "an elastic checkpoint is in safetensors files",
    "variant": "an elastic checkpoint has one set of safetensors files",
    "from_tf": "an elastic checkpoint is in safetensors files",
    "from_flax": "an elastic checkpoint is in safetensors files",
    "fusion_config": "linears are those of the checkpoint, and are fused by this package's kernels",
    "key_mapping": "the names of the tensors are those of the checkpoint",
    "proxies": "set HTTP_PROXY and HTTPS_PROXY instead",
    "use_kernels": "the Triton kernels of this package are used on GPUs by themselves",
}
"""Arguments that would change what a checkpoint is, each with what to do instead."""
_ONLY: dict[str, tuple[object, ...]] = {
    "trust_remote_code": (False, None),
    "use_safetensors": (True, None),
    "weights_only": (True,),
    "low_cpu_mem_usage": (True, False, None),
}
"""Arguments that may be given with one value alone, or change nothing, and are not passed on."""
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def checked_keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for `from_pretrained`, with `dtype` as a text or dtype that the model can have.

    Args:
        given: What the caller of `load` gave, ``dtype`` and ``device`` included.

    Raises:
        CheckpointError: If one of them cannot be honoured; the message says what to do instead.
    """
    found = {name: value for name, value in given.items() if name != "device"}
    if "torch_dtype" in found:  # the former name of transformers
        former = found.pop("torch_dtype")
        found["dtype"] = former if found.get("dtype") in ("auto", None) else found["dtype"]
    if given.get("device") is not None and found.get("device_map") is not None:
        raise CheckpointError("load: give device or device_map, not both")
    _check_places(given.get("device"), found.get("device_map"))
    found["dtype"] = _checked_dtype(found.get("dtype"))
    for name in list(found):
        if name in _REFUSED and found[name] not in (None, False):
            raise CheckpointError(f"load: {name} cannot be given; {_REFUSED[name]}")
        if name in _ONLY and not any(found[name] is allowed for allowed in _ONLY[name]):
            raise CheckpointError(f"load: {name} can only be {_ONLY[name][0]}; nothing of a checkpoint is executed")
        if name in _REFUSED or name in _ONLY:
            del found[name]
    return found


def refuse_unknown(names: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    """Refuses arguments that are neither honoured nor say how a model is run.

    Args:
        names: Arguments that are to be passed on to `from_pretrained`.
        keys: Keys that the configuration of the model has.

    Raises:
        CheckpointError: With the nearest name.
    """
    known = [
        *_HONOURED,
        *HUB_KEYWORDS,
        *CONFIG_KEYWORDS,
        "bits",
        "check_hashes",
        "device",
        "max_bits",
        "trust_router",
        "warm_up",
    ]
    for name in names:
        if name in keys and name not in known:
            raise CheckpointError(f"load: {name} cannot be given; config.json of the checkpoint says what the model is")
        if name not in known:
            raise CheckpointError(f"load: there is no argument {name!r}. {nearest(name, known)}".rstrip())


def _checked_dtype(dtype: Any) -> Any:
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else dtype
    if name is None:
        return "auto"
    if name not in _DTYPES:
        raise CheckpointError(f"load: dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    return dtype if isinstance(dtype, torch.dtype) or name == "auto" else getattr(torch, name)


def check_kinds(**given: Any) -> None:
    """Checks arguments of `load` of its own: `trust_router` is a dotted path or None, `max_bits` a whole number or None.

    Raises:
        CheckpointError: If one of them is of another kind; switches are True or False.
    """
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "trust_router": ((str, type(None)), "the dotted path of a class"),
        "max_bits": ((int, type(None)), "a whole number"),
    }
    for name, value in given.items():
        allowed, expected = kinds.get(name, ((bool,), "True or False"))
        if type(value) not in allowed:
            raise CheckpointError(f"load: {name} should be {expected}, and is {value!r}")


def _check_places(device: Any, device_map: Any) -> None:
    """Refuses devices that are none, and places on which nothing can be computed."""
    places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    for place in [device, *places]:
        if str(place) in ("meta", "disk"):
            raise CheckpointError(
                f"load: nothing can be computed on {str(place)!r}; give a device that holds the weights"
            )
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"load: device {device!r} is none ({str(error).splitlines()[0][:120]})") from error
