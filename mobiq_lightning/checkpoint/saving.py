"""Keeps the hashes of a checkpoint true when transformers saves a loaded model, into the same folder or another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobiq_lightning.checkpoint.check import hash_tensor, read_header, read_tensors
from mobiq_lightning.checkpoint.own_files import SINGLE, read_config, read_hashes, read_index
from mobiq_lightning.checkpoint.write import write_hashes
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.files import sha256
from mobiq_lightning.runs import CONFIG, HASHES, INDEX, LATER


@contextmanager
def saved_with_hashes(folder: Path, n_planes: int, keep: bool) -> Iterator[None]:
    """Context in which transformers saves a model into a folder; when it ends, hashes.json fits what was written.

    Args:
        folder: The folder, which need not exist.
        n_planes: Planes of every weight that the model holds.
        keep: Whether hashes of files that are not written anew stay as they are, so that damage to them stays known.

    Raises:
        CheckpointError: If the folder holds a checkpoint with more planes, which would be lost, or links, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder to save to")
    links = sorted(p.name for pattern in ("*.json", "*.safetensors") for p in folder.glob(pattern) if p.is_symlink())
    if links:
        raise CheckpointError(
            f"{folder}: {', '.join(links[:6])}: links; saving would change the files that they lead to. Save to another folder"
        )
    there = _planes_in(folder)
    if there > n_planes:
        raise CheckpointError(
            f"{folder} holds a checkpoint of {there} bits, and this model only the first {n_planes}: the others would be "
            "lost. Save to another folder"
        )
    known = read_hashes(folder) if there else None
    before = {path: path.stat().st_mtime_ns for path in [*folder.glob("*.json"), *folder.glob("*.safetensors")]}
    (folder / HASHES).unlink(missing_ok=True)  # if this is interrupted, no hashes are better than wrong ones
    yield
    if (folder / SINGLE).exists() and (folder / INDEX).exists():  # the folder held the model in another number of files
        old = INDEX if before.get(folder / INDEX) == (folder / INDEX).stat().st_mtime_ns else SINGLE
        (folder / old).unlink()
    shards = {folder / name for name in read_index(folder).values()}
    tensors = {name: hash_tensor(value) for path in shards for name, value in read_tensors(path, read_header(path))}
    files = {n: v for n, v in (known.files if known is not None else {}).items() if (folder / n).is_file()}
    written = [path.name for path in folder.glob("*.json") if before.get(path) != path.stat().st_mtime_ns]
    again = [*written, *(() if keep else files)]
    files |= {name: sha256(folder / name) for name in again if name not in LATER}
    write_hashes(folder, tensors, files)


def _planes_in(folder: Path) -> int:
    """Planes of each weight that the checkpoint in a folder holds; 0 if it holds none."""
    try:
        return read_config(folder)[1].n_planes if (folder / CONFIG).is_file() else 0
    except CheckpointError:
        return 0
