"""Writes a calibrated model as an elastic checkpoint: one shard per block, so that no more than a block is in memory."""

from __future__ import annotations

import functools
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mobiq_lightning.files import folder_replaced_atomically, sha256, write_json
from mobiq_lightning.layers import ElasticLinear, SlicedLinear, routed_inputs
from mobiq_lightning.packing import FORMAT_VERSION, QUANT_METHOD
from mobiq_lightning.source import BlockLayout, CalibratedBlock, Share, Source

_COPIED = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.jinja", "generation_config.json")
HASHES = "hashes.json"


def export(
    source: Source,
    calibrated: list[CalibratedBlock],
    layout: BlockLayout,
    share_routers: Share,
    router: Callable[..., Any],
    threshold_scope: str,
    folder: Path,
) -> None:
    """Writes the elastic checkpoint.

    Args:
        source: The source model, its blocks holding `SlicedLinear`.
        calibrated: What was learned of each block.
        layout: Where its blocks are.
        share_routers: Which linears share a router.
        router: The factory of the routers.
        threshold_scope: Which threshold table is the default.
        folder: Replaced as a whole once everything is written.
    """
    with folder_replaced_atomically(folder) as temporary:
        _copy_companions(source.folder, temporary)
        decoder = layout.find(source.model)
        names = [f"model-{i + 1:05d}-of-{len(decoder) + 1:05d}.safetensors" for i in range(len(decoder) + 1)]
        weight_map: dict[str, str] = {}
        for index, (block, learned) in enumerate(zip(decoder, calibrated, strict=True)):
            tensors = _block_tensors(f"{layout.blocks}.{index}", block, learned)
            _write_shard(temporary / names[index], tensors, weight_map)
        _write_shard(temporary / names[-1], _other_tensors(source.model, layout.blocks), weight_map)
        size = sum((temporary / name).stat().st_size for name in names)
        write_json(
            temporary / "model.safetensors.index.json",
            {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))},
        )
        config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
        scheme = next(iter(calibrated[0].schemes.values()))
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "slice_bits": list(scheme.slice_bits),  # type: ignore[arg-type]
            "group_size": scheme.group_size,
            "router": describe(router),
            "layout": asdict(layout),
            "share_routers": share_routers,
            "threshold_scope": threshold_scope,
        }
        write_json(temporary / "config.json", config)
        write_json(temporary / HASHES, {name: sha256(temporary / name) for name in names})


def describe(factory: Callable[..., Any]) -> dict[str, Any]:
    """``{"class_path", "init_args"}`` of a factory: a class, or a `functools.partial` of one as recipes give."""
    keywords: dict[str, Any] = {}
    found: Any = factory
    if isinstance(factory, functools.partial):
        keywords = dict(factory.keywords)
        found = next((a for a in (factory.func, *factory.args) if inspect.isclass(a)), factory.func)
    if not inspect.isclass(found):
        raise TypeError(f"a router factory must be a class or a functools.partial of one, not {factory!r}")
    return {"class_path": f"{found.__module__}.{found.__qualname__}", "init_args": keywords}


def _block_tensors(prefix: str, block: nn.Module, learned: CalibratedBlock) -> dict[str, Tensor]:
    """Tensors of one block under the names that `hf.insert_elastic_linears` gives them."""
    tensors: dict[str, Tensor] = {}
    sliced = {name: module for name, module in block.named_modules() if isinstance(module, SlicedLinear)}
    for name, linear in sliced.items():
        device = next(linear.scheme.parameters(), linear.weight).device
        packed = linear.scheme.pack(linear.weight.to(device))
        base = f"{prefix}.{name}"
        tensors |= {f"{base}.plane_{p}": plane for p, plane in enumerate(packed.planes)}
        tensors |= {f"{base}.slice_scale": packed.scale, f"{base}.slice_bias": packed.bias}
        if linear.bias is not None:
            tensors[f"{base}.bias"] = linear.bias
        key = name.replace(".", "-")
        if key in learned.inputs:
            tensors |= {f"{base}.input.{k}": v for k, v in learned.inputs[key].state_dict().items()}
    for name, value in block.state_dict().items():
        if not any(name.startswith(f"{linear}.") for linear in sliced):
            tensors[f"{prefix}.{name}"] = value
    return tensors


def _other_tensors(model: Any, blocks: str) -> dict[str, Tensor]:
    """Tensors outside of the blocks; of tied ones only the first."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if name.startswith(f"{blocks}.") or value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        tensors[name] = value
    return tensors


def _write_shard(path: Path, tensors: dict[str, Tensor], weight_map: dict[str, str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(tensors, path.name)


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template and generation config, unchanged."""
    for pattern in _COPIED:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def stored_bits(model: nn.Module) -> tuple[float, float]:
    """Bits per linear weight that an elastic model spends beside its codes.

    Returns:
        Scale and bias; routers.
    """
    linears = [m for m in model.modules() if isinstance(m, ElasticLinear)]
    n_weights = sum(linear.packed.n_weights for linear in linears)
    overhead = sum(linear.packed.overhead_bits * linear.packed.n_weights for linear in linears) / n_weights
    parameters = [p for routed in routed_inputs(model) for p in routed.router.parameters()]
    routers = sum(torch.finfo(p.dtype).bits * p.numel() for p in parameters) / n_weights
    return overhead, routers
