"""Writes a calibrated model as an elastic checkpoint, block by block as they finish: no more than a block is in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mobiq_lightning.checkpoint.card import write_card
from mobiq_lightning.checkpoint.check import differing_tensors, hash_tensor, read_header
from mobiq_lightning.checkpoint.format import ElasticFormat
from mobiq_lightning.checkpoint.own_files import leads_out
from mobiq_lightning.errors import CheckpointError, FileError
from mobiq_lightning.files import replace_folder, sha256, write_atomically, write_json
from mobiq_lightning.input_files import read_mapping
from mobiq_lightning.nn import BlockLayout, CalibratedBlock, SlicedLinear
from mobiq_lightning.packing import ROUTER, TRANSFORM, compact, input_tensor_name
from mobiq_lightning.runs import COMPANIONS, CONFIG, HASHES, INDEX, LATER, PARTIAL_SUFFIX, RESULTS, Results, shard_name
from mobiq_lightning.sources import Source

_NOTED = ".hashes"
"""What the name of the file ends with in which the hashes of a shard are until all shards are there."""


class CheckpointWriter:
    """Writes an elastic checkpoint into a partial folder, which is renamed to the final one once it is complete.

    After a crash, a new writer on the same folder goes on: shards that are there and whole are kept.

    Args:
        source: The source model, whose blocks hold `SlicedLinear`.
        layout: Place of the blocks in the model.
        folder: Folder that the finished checkpoint will be in.
    """

    def __init__(self, source: Source, layout: BlockLayout, folder: Path) -> None:
        self.source, self.layout, self.folder = source, layout, folder
        self.partial = folder.with_name(f"{folder.name}{PARTIAL_SUFFIX}")
        self.blocks = layout.find(source.model)
        self.n_shards = len(self.blocks) + 1
        companions(source.folder)  # what cannot be copied at the end is said at the beginning

    def write_block(self, index: int) -> None:
        """Writes the shard of block `index`: its planes, scales and tensors that are not sliced.

        Routers, transforms and threshold tables of all blocks are written by `finish`.
        """
        tensors = block_tensors(f"{self.layout.blocks}.{index}", self.blocks[index])
        _write_shard(self.partial / shard_name(index, self.n_shards), tensors)

    def finish(
        self, calibrated: Sequence[CalibratedBlock], stored: ElasticFormat, extra: Mapping[str, str]
    ) -> list[int]:
        """Writes what is missing, with routers and threshold tables, and renames the folder to the finished checkpoint.

        Args:
            calibrated: Calibrated blocks, which hold routers, transforms and threshold tables.
            stored: Format of the checkpoint, which goes into config.json.
            extra: Texts of further files, such as recipe and provenance, by file name.

        Returns:
            Indices of the blocks whose shard was there but damaged, and was written again.
        """
        damaged: list[int] = []
        for index in range(len(calibrated)):
            path = self.partial / shard_name(index, self.n_shards)
            if not _is_whole(path):
                damaged += [index] if path.exists() else []
                self.write_block(index)
        last = _other_tensors(self.source.model, self.layout.blocks)
        for index, learned in enumerate(calibrated):
            last |= _input_tensors(f"{self.layout.blocks}.{index}", learned)
        _write_shard(self.partial / shard_name(len(calibrated), self.n_shards), last)
        for name, text in extra.items():
            (self.partial / name).write_text(text, encoding="utf-8")
        copy_companions(self.source.folder, self.partial)
        config = read_mapping(self.source.folder / CONFIG)
        config |= self.source.config_changes or {}
        config["quantization_config"] = stored.to_json()
        write_json(self.partial / CONFIG, config)
        seal(self.partial)
        write_card(self.partial)
        replace_folder(self.partial, self.folder)
        return damaged


def seal(folder: Path) -> None:
    """Writes index and hashes.json of a folder whose shards are complete, then removes the hashes beside each shard."""
    weight_map: dict[str, str] = {}
    hashes: dict[str, str] = {}
    size = 0
    shards = sorted(folder.glob("*.safetensors"))
    for path in shards:
        header = read_header(path)
        weight_map |= dict.fromkeys(header, path.name)
        size += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
        hashes |= _noted_hashes(path)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
    write_hashes(folder, hashes)
    for path in shards:
        _noted(path).unlink(missing_ok=True)


def write_hashes(folder: Path, tensors: Mapping[str, str], files: Mapping[str, str] | None = None) -> None:
    """Writes hashes.json of a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        tensors: SHA-256 of the bytes of each tensor in hex, by name.
        files: SHA-256 of each file that is no tensor in hex, by name; by default of all that are there.
    """
    if files is None:
        kept = (path for path in folder.rglob("*") if path.is_file() and _is_part(path))
        files = {path.relative_to(folder).as_posix(): sha256(path) for path in kept}
    write_json(folder / HASHES, {"files": dict(sorted(files.items())), "tensors": dict(sorted(tensors.items()))})


def _is_part(path: Path) -> bool:
    """Whether a file of a folder that is being completed is a part of the checkpoint: not what an interrupted write left."""
    return path.suffix not in (".safetensors", _NOTED) and not path.name.startswith(".") and path.name not in LATER


def add_results(folder: Path, results: Results) -> None:
    """Writes what was measured into a checkpoint's results.json, and its model card anew, without whole paths of this machine."""
    measured = results.measured and results.measured.without_places()
    write_json(folder / RESULTS, replace(results, measured=measured).to_json())
    write_card(folder)


def block_tensors(prefix: str, block: nn.Module) -> dict[str, Tensor]:
    """Tensors of one block under the names that elastic linears give them; those of routed inputs are left out.

    Args:
        prefix: Name of the block in the model.
        block: The block, whose sliced linears are packed.

    Raises:
        CheckpointError: If a slice scheme packs another code than it declares.
    """
    tensors: dict[str, Tensor] = {}
    sliced = {name: module for name, module in block.named_modules() if isinstance(module, SlicedLinear)}
    for name, linear in sliced.items():
        device = next(linear.scheme.parameters(), linear.weight).device
        packed = linear.scheme.pack(linear.sliced_weight().to(device))
        base = f"{prefix}.{name}"
        if packed.code != linear.scheme.code:
            kind = type(linear.scheme).__name__
            raise CheckpointError(
                f"{base}: {kind} packs the {packed.code} code, but its `code` is {linear.scheme.code!r}; nothing could read "
                f"the checkpoint. Set `code = {type(packed).__name__}.code` in {kind}"
            )
        tensors |= {f"{base}.{own_name}": tensor for own_name, tensor in packed.named_tensors.items()}
        if (bias := linear.sliced_bias()) is not None:
            tensors[f"{base}.bias"] = bias
    for name, value in block.state_dict().items():
        if not any(name.startswith(f"{linear}.") for linear in sliced):
            tensors[f"{prefix}.{name}"] = value
    return tensors


def companions(source: Path) -> list[Path]:
    """Files that belong to a source model beside its weights: tokenizer, chat templates, generation config, licence.

    Raises:
        CheckpointError: If one of them is a link that leads out of the model's folder: it would be published with the copy.
    """
    found = sorted({path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()})
    leading_out = [path.name for path in found if leads_out(path, source)]
    if leading_out:
        raise CheckpointError(
            f"{source}: {', '.join(leading_out)} would be copied into the checkpoint, and is a link that leads out of that "
            "folder; put the file itself there, if it belongs to the model, or remove the link"
        )
    return found


def copy_companions(source: Path, folder: Path) -> None:
    """Copies the files that `companions` finds, unchanged, to the same places in the folder of a checkpoint."""
    for path in companions(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def write_shard(path: Path, tensors: Mapping[str, Tensor], hashes: Mapping[str, str]) -> None:
    """Writes tensors into a safetensors file, atomically, and notes their hashes in a file beside it until `seal`.

    Args:
        path: The file.
        tensors: Tensors on the host, by name.
        hashes: SHA-256 of each tensor's bytes in hex, by name.
    """
    write_json(_noted(path), dict(hashes))

    def write(temporary: Path) -> None:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors leaves files that only their owner can read

    write_atomically(path, write)


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_shard(path, ready, {name: hash_tensor(tensor) for name, tensor in ready.items()})


def _is_whole(path: Path) -> bool:
    """Whether a shard and its noted hashes are there and agree."""
    try:
        header, hashes = read_header(path), _noted_hashes(path)
    except (CheckpointError, FileError):
        return False
    return set(hashes) == set(header) and not differing_tensors(dict.fromkeys(header, path), hashes)


def _noted(path: Path) -> Path:
    return path.with_name(f"{path.name}{_NOTED}")


def _noted_hashes(path: Path) -> dict[str, str]:
    """Hashes of the tensors of a shard, noted beside it or, if the folder was completed once before, in hashes.json."""
    if _noted(path).is_file():
        stored = read_mapping(_noted(path))
    else:
        tensors = read_mapping(path.parent / HASHES).get("tensors")
        stored = {n: tensors.get(n) for n in read_header(path)} if isinstance(tensors, dict) else {}
    return {name: str(value) for name, value in stored.items()}


def _input_tensors(prefix: str, learned: CalibratedBlock) -> dict[str, Tensor]:
    """Routers, transforms and threshold tables of one block."""
    tensors: dict[str, Tensor] = {}
    for key, routed in zip(learned.inputs, learned.routed_inputs(), strict=True):
        held = {name: value for name, value in routed.state_dict().items() if not name.startswith(f"{TRANSFORM}.")}
        if routed.transform is not None:
            held |= {f"{TRANSFORM}.{name}": value for name, value in routed.transform.stored().items()}
        held = {name: compact(value) if name.startswith(f"{ROUTER}.") else value for name, value in held.items()}
        carrier = f"{prefix}.{key.replace('-', '.')}"
        tensors |= {input_tensor_name(carrier, name): value for name, value in held.items()}
    return tensors


def _other_tensors(model: Any, blocks: str) -> dict[str, Tensor]:
    """Tensors outside of the blocks, of which tied ones are kept once, under their first name."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if name.startswith(f"{blocks}.") or value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        tensors[name] = value
    return tensors
