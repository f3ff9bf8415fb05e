"""The run folder: whose it is, how far it is, and what a command may do in it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mobiq_lightning.console import say
from mobiq_lightning.errors import FileError, RunFolderError
from mobiq_lightning.files import is_leftover, remove, remove_leftovers, sha256, write_json, write_text
from mobiq_lightning.input_files import read_mapping, read_text, read_yaml
from mobiq_lightning.runs.file_names import (
    CHECKPOINTS,
    CONFIG,
    ELASTIC,
    GENERATED,
    LOCK,
    OUTLIERS,
    PARTIAL,
    RESULTS,
    RETRIES,
    RUN_CONFIG,
    RUN_FILES,
)
from mobiq_lightning.runs.lock import FolderLock
from mobiq_lightning.runs.results import Results, read_results
from mobiq_lightning.runs.same_recipe import differing_keys_of_runs

_FROM_ANOTHER_RECIPE = tuple(name for name in RUN_FILES if name not in (CHECKPOINTS, GENERATED, RUN_CONFIG))
"""What is removed where no epoch was finished: what the model wrote is kept, its file names say what it depends on."""
_WRITTEN_ATOMICALLY = (CHECKPOINTS, ELASTIC, PARTIAL, GENERATED)
"""Folders of a run in which a kill may leave what was not finished."""
_WHOLE_MODEL = "model"
_LONGEST_PATH = 200
"""Characters of a path that a message shows."""


class RunFolder:
    """A folder that holds one run.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FolderLock(self.path / LOCK)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def recipe(self) -> Path:
        """The recipe that the run was made from, with every default written out."""
        return self.path / RUN_CONFIG

    @property
    def checkpoint(self) -> Path:
        """The folder of the elastic checkpoint, which `mobiq_lightning.load` takes."""
        return self.path / ELASTIC

    def results(self) -> Results:
        """What the run has measured; perplexities by allocation and bits are in `measured.rows`.

        Raises:
            RunFolderError: If the run is not finished.
            ResultsError: If results.json is damaged or from another version.
        """
        path = self.path / RESULTS
        if not path.is_file():
            raise RunFolderError(f"{self.path} holds no {RESULTS}: the run is not finished; `fit` goes on with it")
        return read_results(path)

    @property
    def finished(self) -> bool:
        """Whether the run in it has both a checkpoint and results."""
        return (self.path / RESULTS).is_file() and (self.path / ELASTIC / CONFIG).is_file()

    def lock(self) -> None:
        """Makes the folder if need be, and keeps other runs out of it until `release` or the end of the process.

        What killed runs left half-written is removed, and what they were replacing is put back.

        Raises:
            RunFolderError: If another process is at work in it, naming that process, or it cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            restored = remove_leftovers(self.path, RUN_FILES)
            for name in _WRITTEN_ATOMICALLY:
                remove_leftovers(self.path / name)
        except (OSError, ValueError) as error:  # a ValueError for a name with a zero byte
            self.release()
            if getattr(error, "errno", None) in (errno.EROFS, errno.EACCES) and self.finished:
                return  # nothing more is written there
            raise RunFolderError(
                f"{_shortened(self.path)}: this folder cannot be made or written to ({_reason(error)}); give another"
            ) from error
        for name in restored:
            say(f"{self.path / name} was being replaced when a run was killed; what it held before is back.")

    def release(self) -> None:
        """Lets other runs in again."""
        self._lock.release()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of the folder within it.

        Raises:
            RunFolderError: If `lock` raises it.
        """
        self.lock()
        try:
            yield
        finally:
            self.release()

    def check_in_place(self) -> None:
        """Makes sure that the folder which this run has locked is still there, before more is written to it.

        Raises:
            RunFolderError: If it was removed or moved away.
        """
        if self._lock.lost:
            raise RunFolderError(
                f"{self.path} was removed or moved away while its run was at work; the run ends. The same command starts it "
                "anew; where the folder was moved, give its new place as --trainer.default_root_dir to go on"
            )

    @property
    def finished_work(self) -> list[str]:
        """Names of what the folder holds that took a run time: training checkpoints, a checkpoint, results."""
        names = [name for name in (ELASTIC, RESULTS, OUTLIERS) if _holds_something(self.path / name)]
        return names + ([CHECKPOINTS] if any((self.path / CHECKPOINTS).glob("*.ckpt")) else [])

    def claim(self, recipe: dict[str, Any], overwrite: bool) -> bool:
        """Makes the folder this recipe's; a run that has not finished an epoch gives way to a corrected recipe.

        Args:
            recipe: The full recipe.
            overwrite: Remove another run.

        Returns:
            Whether the folder already held a run of this recipe.

        Raises:
            RunFolderError: If it holds another run, or files that are no run.
        """
        if overwrite:
            self.clear()
        config = self.path / RUN_CONFIG
        stored, work = self._stored_recipe(), self.finished_work
        if stored is not None:
            differences = list(differing_keys_of_runs(stored, recipe))
            if differences and work:
                raise RunFolderError(
                    f"{self.path} holds a run with another recipe:\n  " + "\n  ".join(differences) + "\n"
                    "Give another trainer.default_root_dir, or --overwrite to remove that run. To compare a finished run "
                    "at other bits or on other text, use `validate`"
                )
            if not differences:
                if stored != recipe and not self.finished:
                    write_text(config, yaml.safe_dump(recipe, sort_keys=False))
                return True
            for name in _FROM_ANOTHER_RECIPE:
                remove(self.path / name)
        elif work:
            raise RunFolderError(
                f"{self.path} holds {', '.join(work)} but no {RUN_CONFIG}, so what made them is unknown. Give another "
                "trainer.default_root_dir, or --overwrite to remove them"
            )
        write_text(config, yaml.safe_dump(recipe, sort_keys=False))
        return False

    def _stored_recipe(self) -> dict[str, Any] | None:
        """The recipe of the run that the folder holds; None if there is none, or one that is damaged and began nothing."""
        config = self.path / RUN_CONFIG
        if not config.exists():
            return None
        try:
            stored = read_yaml(config)
            problem = "" if _may_be_a_recipe(stored) else f"{config} holds no recipe"
        except FileError as error:
            stored, problem = None, str(error)
        if problem and self.finished_work:
            raise RunFolderError(
                f"{problem}, so what made {', '.join(self.finished_work)} beside it is unknown. Put a copy of it back, give "
                "another trainer.default_root_dir, or --overwrite to remove the run"
            )
        return None if problem else stored

    def clear(self) -> None:
        """Removes what a run writes, and nothing else; what a link leads to is somebody else's.

        A link in place of checkpoints/ stays, for it leads to where there is room; training checkpoints behind it are removed.

        Raises:
            RunFolderError: If something cannot be removed.
        """
        names = [name for name in RUN_FILES if name != RUN_CONFIG]
        try:
            for path in (
                self.path / name for name in [*names, RUN_CONFIG]
            ):  # the recipe last: it says whose the rest is
                if path.is_symlink() and path.is_dir():
                    self._clear_link(path)
                else:
                    remove(path)
        except OSError as error:
            raise RunFolderError(
                f"--overwrite: {error.filename or self.path} cannot be removed ({_reason(error)}); remove it by hand, or "
                "give another trainer.default_root_dir"
            ) from error

    def _clear_link(self, path: Path) -> None:
        """Removes a link to a folder; one that training checkpoints are kept behind is emptied of them and stays."""
        if path.name != CHECKPOINTS:
            path.unlink()
            say(f"{path} was a link to a folder; the link is removed, and what the folder holds is left alone.")
            return
        for inner in path.iterdir():
            if inner.suffix in (".ckpt", ".sha256") or is_leftover(inner.name):
                remove(inner)
        say(f"{path} is a link and stays; the training checkpoints behind it, in {path.resolve()}, are removed.")

    def newest_checkpoint(self, can_be_read: Callable[[Path], bool]) -> tuple[Path | None, list[Path]]:
        """The newest training checkpoint that is whole.

        Args:
            can_be_read: Whether one whose bytes are those that were written can be read.

        Returns:
            Its path, or None; and the newer ones that are damaged.
        """
        damaged: list[Path] = []
        for path in sorted((self.path / CHECKPOINTS).glob("*.ckpt"), key=_epoch, reverse=True):
            if _has_its_hash(path) and can_be_read(path):
                return path, damaged
            damaged.append(path)
        return None, damaged

    @property
    def epochs_kept(self) -> int:
        """Epochs done by the newest training checkpoint that was written to its end; damage is not looked for."""
        found = (self.path / CHECKPOINTS).glob("*.ckpt")
        return max((_epoch(path) + 1 for path in found if path.with_suffix(".sha256").is_file()), default=0)

    def drop_checkpoints_after(self, epochs_done: int) -> None:
        """Removes the training checkpoints written after `epochs_done` epochs."""
        for path in (self.path / CHECKPOINTS).glob("*.ckpt"):
            if _epoch(path) >= epochs_done:
                path.unlink()
                path.with_suffix(".sha256").unlink(missing_ok=True)

    def retries(self) -> dict[int | None, int]:
        """How often each block, or the stages of the whole model (None), were started anew after NaN or infinity."""
        path = self.path / RETRIES
        stored = read_mapping(path) if path.is_file() else {}
        return {None if k == _WHOLE_MODEL else int(k): v for k, v in stored.items()}

    def note_retry(self, block: int | None) -> int:
        """Counts a retry of a block; returns how many it has had."""
        retries = self.retries()
        retries[block] = retries.get(block, 0) + 1
        write_json(self.path / RETRIES, {_WHOLE_MODEL if k is None else k: v for k, v in retries.items()})
        return retries[block]


def _may_be_a_recipe(stored: Any) -> bool:
    trainer = stored.get("trainer") if isinstance(stored, dict) else 0
    return trainer is None or (isinstance(trainer, dict) and isinstance(trainer.get("callbacks"), (list, type(None))))


def _has_its_hash(path: Path) -> bool:
    """Whether the hash beside a file is that of its bytes."""
    try:
        return read_text(path.with_suffix(".sha256")).strip() == sha256(path)
    except (FileError, OSError):
        return False


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _reason(error: Exception) -> str:
    """Why something cannot be done, in the system's words."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def _shortened(path: Path) -> str:
    text = os.fspath(path)
    return text if len(text) <= _LONGEST_PATH else f"{text[:_LONGEST_PATH]}... ({len(text)} characters)"


def _epoch(path: Path) -> int:
    found = re.search(r"epoch-(\d+)", path.stem)
    return int(found.group(1)) if found else -1
