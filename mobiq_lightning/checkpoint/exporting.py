"""Exports a finished checkpoint to another folder, whole or with its first planes only, one shard at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mobiq_lightning.checkpoint.card import write_card
from mobiq_lightning.checkpoint.check import describe_problems, hash_tensor, shape_problems
from mobiq_lightning.checkpoint.contents import Contents, read_contents
from mobiq_lightning.checkpoint.loading import resolve
from mobiq_lightning.checkpoint.named_classes import router_class
from mobiq_lightning.checkpoint.own_files import own_file, read_index, unhashed_files
from mobiq_lightning.checkpoint.quantizer import expected_tensors
from mobiq_lightning.checkpoint.summary import skeleton
from mobiq_lightning.checkpoint.values import value_problems
from mobiq_lightning.checkpoint.verification import check_figures
from mobiq_lightning.checkpoint.write import seal, write_shard
from mobiq_lightning.console import say
from mobiq_lightning.errors import BitsError, CheckpointError, UntrustedClassError
from mobiq_lightning.files import folder_replaced_atomically, remove_leftovers, write_json
from mobiq_lightning.nn import held_slices
from mobiq_lightning.packing import plane_of
from mobiq_lightning.runs import CARD, CONFIG, HASHES, INDEX, LATER

_NOTHING = "nothing was exported"


def export(source: str | Path, to: str | Path, max_bits: int | None = None, overwrite: bool = False) -> Path:
    """Writes a copy of a checkpoint, whole or with its first planes only; what is copied was compared with its hashes.

    Args:
        source: A run folder, or an elastic checkpoint.
        to: The new folder.
        max_bits: Depth in bits up to which planes are kept, which must be a prefix of the slices; by default all.
        overwrite: Whether to replace the new folder if it is an elastic checkpoint. It is replaced when the copy is whole.

    Returns:
        The new folder.

    Raises:
        CheckpointError: If the source is damaged or has no hashes, or the new folder is there and may not be replaced.
        BitsError: If `max_bits` is no prefix of the slices, or more than the source holds.
    """
    origin = resolve(source)
    folder = _target(origin, to, overwrite)
    contents = read_contents(origin)
    contents.require_whole(_NOTHING)
    if contents.hashes is None:
        raise CheckpointError(
            f"{origin} has no {HASHES}, so whether it is whole cannot be told; nothing was exported. If you trust it, "
            "mobiq_lightning.load(...).save_pretrained(folder) writes a copy with new hashes"
        )
    elastic, held = contents.elastic, contents.elastic.n_planes
    n_planes = held if max_bits is None else max_bits
    held_slices(tuple(elastic.slice_bits), n_planes)
    if n_planes > held:
        raise BitsError(f"max_bits ({n_planes}) is more than the {held} bits that {origin} holds")
    elastic.max_bits = None if n_planes == sum(elastic.slice_bits) else n_planes
    config = {**contents.config, "quantization_config": elastic.to_json()}
    falls = _check_shapes(contents)
    left_out = unhashed_files(origin, contents.hashes, [path.name for path in contents.shards])
    if left_out:
        say(f"{origin}: {', '.join(left_out)}: no part of the checkpoint (without a hash in {HASHES}); not exported.")
    with _writing(folder), folder_replaced_atomically(folder) as temporary:
        for name in _companions(contents):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(own_file(origin, name, nested=True), temporary / name)
        write_json(temporary / CONFIG, config)
        for path in contents.shards:
            _copy_shard(path, temporary / path.name, n_planes, contents.hashes.tensors, falls)
        seal(temporary)
        write_card(temporary)
    return folder


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Context in which a folder is written; what the file system refuses is said."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error}); make room there, or give another folder"
        ) from error


def _target(origin: Path, to: str | Path, overwrite: bool) -> Path:
    """The folder to export to, links followed, so that the folder itself is replaced and not a link to it.

    Raises:
        CheckpointError: If it is there and may not be replaced.
    """
    try:
        folder = Path(to).expanduser().resolve()
        remove_leftovers(folder.parent, {folder.name})
        exists = folder.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{to!r} can be no folder ({error}); give another folder") from error
    source = origin.resolve()
    if folder == source:
        raise CheckpointError(f"{to} is the checkpoint itself; give another folder")
    if source.is_relative_to(folder) or folder.is_relative_to(source):
        inside = "lies in" if source.is_relative_to(folder) else "holds"
        raise CheckpointError(f"{origin}, which is exported, {inside} {to}; give a folder beside it")
    if exists and not overwrite:
        raise CheckpointError(f"{to} exists; give another folder, or --overwrite to replace it if it is a checkpoint")
    if exists:
        _refuse_foreign(folder)
    return folder


def _refuse_foreign(folder: Path) -> None:
    """Raises a `CheckpointError` unless a folder is an elastic checkpoint and holds nothing else."""
    try:
        contents = read_contents(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is no elastic checkpoint and is not replaced ({error}). Give another folder, or remove it yourself"
        ) from error
    hashes = contents.hashes
    foreign = [HASHES] if hashes is None else unhashed_files(folder, hashes, read_index(folder).values())
    if foreign:
        what = f"has no {HASHES}" if hashes is None else f"also holds {', '.join(foreign[:6])}, which no export wrote"
        raise CheckpointError(f"{folder} {what}; it is not replaced. Give another folder, or remove it yourself")


def _companions(contents: Contents) -> list[str]:
    """Files to copy as they are: all that have a hash, and what was measured. Config, index, hashes and card are made anew."""
    assert contents.hashes is not None
    names = [name for name in contents.hashes.files if name not in (CONFIG, INDEX)]
    for name in LATER:
        if name not in (HASHES, CARD) and (contents.folder / name).exists():
            own_file(contents.folder, name)
            names.append(name)
    check_figures(contents.folder)
    return names


def _check_shapes(contents: Contents) -> bool:
    """Compares the shapes of all tensors with the model that config.json describes, unless its router is of somebody's own.

    Returns:
        Whether thresholds must fall as budgets rise.

    Raises:
        CheckpointError: If they do not fit.
    """
    try:
        router = router_class(contents.elastic.router["class_path"])
    except UntrustedClassError:
        return False  # a copy needs no code of somebody else's; whoever loads it says that it may run
    expected = expected_tensors(skeleton(contents.folder, contents.elastic))
    contents.problems += shape_problems(contents.headers, contents.where, expected)
    contents.require_whole(_NOTHING)
    return router.per_token


def _copy_shard(path: Path, target: Path, n_planes: int, hashes: dict[str, str], falls: bool) -> None:
    """Copies the tensors of a shard that are kept, having looked at their bytes and their values."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [(name, plane_of(name)) for name in file.keys()]  # noqa: SIM118 - not a dict
            kept = [name for name, plane in names if plane is None or plane < n_planes]
            tensors = {name: file.get_tensor(name) for name in kept}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(describe_problems(path.parent, [f"{path.name}: {error}"], _NOTHING)) from error
    found = {name: hash_tensor(tensor) for name, tensor in tensors.items()}
    problems = [
        f"the bytes of {name} are not those that were written" for name in found if hashes.get(name) != found[name]
    ] or [problem for name in tensors for problem in value_problems(name, tensors.__getitem__, falls)]
    if problems:
        raise CheckpointError(describe_problems(path.parent, [f"{path.name}: {p}" for p in problems], _NOTHING))
    write_shard(target, tensors, found)
