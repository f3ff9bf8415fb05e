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
_REFUSED = {
    "config": "config.json of the checkpoint says what the model is; give keys of it by their names",
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
_DTYPES = ("auto", "float32", "bfloat16", "float16")


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
    """Refuses arguments that are neither honoured nor keys of the model's configuration.

    Args:
        names: Arguments that are to be passed on to `from_pretrained`.
        keys: Keys that the configuration of the model has.

    Raises:
        CheckpointError: With the nearest name.
    """
    known = [*_HONOURED, *HUB_KEYWORDS, *keys, "bits", "check_hashes", "device", "max_bits", "trust_router", "warm_up"]
    for name in names:
        if name not in known:
            raise CheckpointError(f"load: there is no argument {name!r}. {nearest(name, known)}".rstrip())


def _checked_dtype(dtype: Any) -> Any:
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else dtype
    if name is None:
        return "auto"
    if name not in _DTYPES:
        raise CheckpointError(f"load: dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    return dtype if isinstance(dtype, torch.dtype) or name == "auto" else getattr(torch, name)
