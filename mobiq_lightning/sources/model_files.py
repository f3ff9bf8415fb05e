"""The files of a source model: which of them hold weights, whether they can be opened, and what identifies them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mobiq_lightning.console import say
from mobiq_lightning.errors import FileError, ModelError
from mobiq_lightning.files import remove, write_json
from mobiq_lightning.input_files import is_file, open_regular, read_mapping

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of a file with all weights, in the order in which the loader looks for them; NAME.index.json names several."""
WEIGHT_PATTERNS = {"model.safetensors": "*.safetensors", "pytorch_model.bin": "pytorch_model*.bin"}
"""Files that each of `WEIGHTS` may be cut into, as patterns for the downloader."""
OTHER_PATTERNS = ["*.json", "*.model", "*.jinja"]
"""What else is downloaded: configuration and tokenizer."""
HASHED_FROM = 16 * 2**20
"""Size in bytes from which the hash of a file is kept: smaller ones are read in a moment."""
_SETTLED_NS = 2 * 10**9
"""Age of a file from which another change would show in its times, in nanoseconds."""
_ABANDONED = 3600
"""Seconds after which a folder of the cache that is not whole, and in which nothing was made, is nobody's."""
_SIZES = ".sizes.json"
"""File in a folder of the cache with the sizes in bytes of the others, by name."""


def check_files(folder: Path) -> None:
    """Refuses a folder in which something lies that would not be read but waited for: a named pipe, a socket, a device.

    Raises:
        ModelError: Naming it.
    """
    for path in sorted((*folder.iterdir(), *folder.glob("additional_chat_templates/*"))):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ModelError(f"model.pretrained: {path} is no regular file; a model folder holds files alone")


def check_local_model(pretrained: str) -> Path | None:
    """The folder that the name of a model means, if it means one; None for ``builtin`` and what may be an id of the hub.

    Raises:
        ModelError: If there is no such folder, or it is none of a model.
    """
    if pretrained == "builtin":
        return None
    path = Path(pretrained).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"model.pretrained: {path} has no config.json; give a Hugging Face model folder")
        return path
    if path.is_file():
        raise ModelError(
            f"model.pretrained: {path} is a file; give the folder of a Hugging Face model, or a .gguf file"
        )
    if path.is_absolute() or pretrained.startswith(".") or pretrained.count("/") > 1:
        raise ModelError(f"model.pretrained: there is no folder {path.absolute()}")
    return None


def weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The files with weights that transformers loads from a folder, and the index that names them if there is one.

    Args:
        folder: Folder of a model.
        config: What its config.json holds.

    Raises:
        ModelError: If there are none, or an index is damaged or names what is missing or lies elsewhere.
    """
    named = config.get("transformers_weights")
    if isinstance(named, str) and (Path(named).is_absolute() or ".." in Path(named).parts):
        raise ModelError(
            f"model.pretrained: {folder / 'config.json'} names the weights {named!r}, which lies elsewhere"
        )
    names = [named] if isinstance(named, str) else [n for w in WEIGHTS for n in (w, f"{w}.index.json")]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ModelError(
            f"model.pretrained: {folder} holds no weights ({' or '.join(map(str, names))}); the download may be incomplete"
        )
    files = [found]
    if found.name.endswith(".index.json"):
        files += [folder / name for name in _shards(found)]
    for path in files:
        try:
            open_regular(path).close()
        except FileError as error:
            raise ModelError(f"model.pretrained: {error}; the download may be incomplete") from error
    return files


def _shards(index: Path) -> list[str]:
    """Names of the files that an index lists, each once."""
    try:
        content = read_mapping(index)
    except FileError as error:
        raise ModelError(f"model.pretrained: {error}") from error
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(content.get("metadata"), dict):
        raise ModelError(f"model.pretrained: {index} lacks weight_map or metadata, so it is no index of weights")
    wrong = [name for name in weight_map.values() if not isinstance(name, str) or name != Path(name).name or not name]
    if wrong:
        raise ModelError(f"model.pretrained: {index} names {wrong[0]!r}, which is no file beside it")
    return sorted(set(weight_map.values()))


def fingerprint(folder: Path, files: list[Path]) -> str:
    """SHA-256 (first 16 hex digits) of config.json and of name and content of every file with weights.

    Args:
        folder: Folder of a model.
        files: The files that `weight_files` gives.

    Raises:
        ModelError: If one cannot be read.
    """
    kept = _KeptHashes()
    try:
        sha = hashlib.sha256(_read(folder / "config.json"))
        for path in files:
            sha.update(f"{path.name} {kept.sha256(path)}\n".encode())
    except (FileError, OSError) as error:
        raise ModelError(f"model.pretrained: {error}") from error
    kept.save()
    return sha.hexdigest()[:16]


def kept_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex, from the cache folder if it is known there and the file has not changed since.

    Raises:
        FileError: If it cannot be read.
    """
    kept = _KeptHashes()
    found = kept.sha256(path)
    kept.save()
    return found


def former_fingerprint(folder: Path) -> str:
    """What identified weights before `fingerprint`, for runs that were started then.

    SHA-256 (first 16 hex digits) of config.json and of name, size, first and last MiB of every .safetensors file.
    """
    sha = hashlib.sha256(_read(folder / "config.json"))
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with open_regular(path) as file:
            sha.update(f"{path.name} {size}".encode() + file.read(2**20))
            file.seek(max(0, size - 2**20))
            sha.update(file.read())
    return sha.hexdigest()[:16]


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def cache_folder() -> Path:
    """Where the package keeps what it need not make again: the environment variable ``MOBIQ_CACHE``, or the user's cache."""
    import platformdirs  # an installation that loads a full-precision model for `evaluate` need not have it

    return Path(os.environ.get("MOBIQ_CACHE") or platformdirs.user_cache_dir("mobiq_lightning")).expanduser()


def make_once(target: Path, write: Callable[[Path], None]) -> None:
    """Makes a folder of the cache unless it is there; several processes may ask for it at the same time.

    A folder that lacks one of its files, or in which one has another size than it was made with, is made again, and said so.

    Args:
        target: The folder.
        write: Fills a sibling folder, which then takes its name.

    Raises:
        OSError: If it cannot be written.
    """
    from filelock import FileLock

    if target.is_dir() and not _lost(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # Ranks of one run ask at the same time; without the lock each would do the work, all on the same cores.
    with FileLock(target.with_suffix(".lock")):
        if target.exists():
            if not (lost := _lost(target)):
                return
            say(f"{target} is damaged ({', '.join(lost)}) and is made again.")
            remove(target)
        for left in target.parent.glob(f".{target.name}.*"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > _ABANDONED:  # where locks do not work, another may be at it
                shutil.rmtree(left, ignore_errors=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        partial.mkdir()
        try:
            write(partial)
            sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
            (partial / _SIZES).write_text(json.dumps(sizes), encoding="utf-8")
            for path in partial.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            try:
                os.replace(partial, target)
            except OSError:
                if not target.is_dir():  # else another process was first, where locks do not work
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _lost(folder: Path) -> list[str]:
    """Names of the files of a folder of the cache that are not there as they were made."""
    try:
        sizes = json.loads(_read(folder / _SIZES))
        whole = {path.name: path.stat().st_size for path in folder.iterdir() if is_file(path)}
        return [name for name, size in sizes.items() if whole.get(name) != size] if sizes else [_SIZES]
    except (FileError, OSError, ValueError, AttributeError, TypeError):
        return [_SIZES]


class _KeptHashes:
    """Hashes of large files, kept in the cache folder by path, size, times and inode, so that each is read once.

    The time of the last change to the inode is one that programs which set the others cannot set. A file that was changed a
    moment ago is not kept, since another change might not show.
    """

    def __init__(self) -> None:
        self.path = cache_folder() / "weight-hashes.json"
        self.known = self._load()
        self.new: dict[str, list[Any]] = {}

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file, in hex."""
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            key = str(path.resolve())
            entry = self.known.get(key)
            if isinstance(entry, list) and entry[:-1] == state and isinstance(entry[-1], str):
                return entry[-1]
            digest = hashlib.sha256()
            while chunk := file.read(2**22):
                digest.update(chunk)
        sha = digest.hexdigest()
        settled = max(status.st_mtime_ns, status.st_ctime_ns) < time.time_ns() - _SETTLED_NS
        if status.st_size >= HASHED_FROM and settled:
            self.new[key] = [*state, sha]
        return sha

    def save(self) -> None:
        """Keeps what was found, as far as the cache can be written: without it files are read again, that is all."""
        from filelock import FileLock

        if not self.new:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock")):
                present = {key: entry for key, entry in self._load().items() if Path(key).is_file()}
                write_json(self.path, {**present, **self.new})
        except OSError:
            pass

    def _load(self) -> dict[str, Any]:
        try:
            return read_mapping(self.path)
        except FileError:  # missing, or damaged: then it is made anew
            return {}


def tensors_of(files: list[Path]) -> Iterator[str]:
    """Names of the tensors in those files that are safetensors, from their headers alone.

    Raises:
        ModelError: If a header is damaged, or a file is shorter than its header says.
    """
    from safetensors import SafetensorError, safe_open

    for path in files:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    yield from file.keys()
            except (SafetensorError, OSError, ValueError) as error:
                raise ModelError(
                    f"model.pretrained: {path} is damaged or cut short ({str(error).splitlines()[0]}); download it again"
                ) from error
