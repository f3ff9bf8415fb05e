"""Exports a finished checkpoint to another folder, whole or with its first planes only, one shard at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mobiq_lightning.checkpoint.card import write_card
from mobiq_lightning.checkpoint.check import describe_problems, hash_tensor
from mobiq_lightning.checkpoint.format import ElasticFormat
from mobiq_lightning.checkpoint.loading import resolve
from mobiq_lightning.checkpoint.write import seal, write_shard
from mobiq_lightning.errors import BitsError, CheckpointError
from mobiq_lightning.files import folder_replaced_atomically, write_json
from mobiq_lightning.nn import held_slices
from mobiq_lightning.packing import plane_of
from mobiq_lightning.runs import CARD, CONFIG, HASHES, INDEX


def export(source: str | Path, to: str | Path, max_bits: int | None = None, overwrite: bool = False) -> Path:
    """Writes a copy of a checkpoint, whole or with its first planes only, checked against its hashes on the way.

    Args:
        source: A run folder, or an elastic checkpoint.
        to: The new folder.
        max_bits: Depth in bits up to which planes are kept, which must be a prefix of the slices; by default all.
        overwrite: Whether to replace the new folder if it is there.

    Returns:
        The new folder.

    Raises:
        CheckpointError: If the source is damaged, or the folder is there and `overwrite` was not given.
        BitsError: If `max_bits` is no prefix of the slices, or more than the source holds.
    """
    origin, folder = resolve(source), Path(to)
    if folder.resolve() == origin.resolve():
        raise CheckpointError(f"{folder} is the checkpoint itself; give another folder")
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists; give another folder, or --overwrite to replace it")
    config = json.loads((origin / CONFIG).read_text(encoding="utf-8"))
    elastic = ElasticFormat.from_json(config["quantization_config"])
    held = elastic.n_planes
    n_planes = max_bits or held
    held_slices(tuple(elastic.slice_bits), n_planes)
    if n_planes > held:
        raise BitsError(f"max_bits ({n_planes}) is more than the {held} bits that {origin} holds")
    elastic.max_bits = None if n_planes == sum(elastic.slice_bits) else n_planes
    config["quantization_config"] = elastic.to_json()
    with folder_replaced_atomically(folder) as temporary:
        for path in sorted(origin.iterdir()):
            if path.suffix != ".safetensors" and path.is_file() and path.name not in (CONFIG, INDEX, HASHES, CARD):
                shutil.copyfile(path, temporary / path.name)
        write_json(temporary / CONFIG, config)
        hashes = _read_hashes(origin)
        for path in sorted(origin.glob("*.safetensors")):
            _copy_shard(path, temporary / path.name, n_planes, hashes)
        seal(temporary)
        write_card(temporary)
    return folder


def _copy_shard(path: Path, target: Path, n_planes: int, hashes: dict[str, str] | None) -> None:
    """Copies the tensors of a shard that are kept."""
    with safe_open(path, framework="pt") as file:
        names = [(name, plane_of(name)) for name in file.keys()]  # noqa: SIM118 - not a dict
        kept = [name for name, plane in names if plane is None or plane < n_planes]
        tensors = {name: file.get_tensor(name) for name in kept}
    found = {name: hash_tensor(tensor) for name, tensor in tensors.items()}
    differing = [name for name in found if hashes is not None and hashes.get(name) != found[name]]
    if differing:
        lines = [f"{path.name}: the bytes of {name} are not those that were written" for name in differing]
        raise CheckpointError(describe_problems(path.parent, lines, "nothing was exported"))
    write_shard(target, tensors, found)


def _read_hashes(folder: Path) -> dict[str, str] | None:
    path = folder / HASHES
    if not path.is_file():
        return None
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return dict(stored["tensors"])
