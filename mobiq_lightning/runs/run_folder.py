"""The run folder: whose it is, how far it is, and what a command may do in it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from mobiq_lightning.console import say
from mobiq_lightning.errors import FileError, RunFolderError
from mobiq_lightning.files import remove, remove_leftovers, sha256, write_json, write_text
from mobiq_lightning.input_files import read_mapping, read_text, read_yaml
from mobiq_lightning.runs.file_names import (
    CHECKPOINTS,
    COMPARING,
    CONFIG,
    CSV_LOG,
    ELASTIC,
    GENERATED,
    HIDDEN_STATES,
    IDENTITY,
    JOURNAL,
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
from mobiq_lightning.runs.set_aside import SetAside

_HEADING = "# The recipe of this run with every default written out; its first line tells that a run has written it.\n"
_FROM_ANOTHER_RECIPE = (IDENTITY, RETRIES, HIDDEN_STATES, JOURNAL, PARTIAL)
"""What a run without a finished epoch may have left that another recipe has no use for. What the model wrote itself is kept:
its file names say what it depends on."""
TRAINING_CHECKPOINTS = "*epoch-[0-9]*.ckpt"
"""Pattern of the names of training checkpoints; others are somebody else's."""
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
        self._aside = SetAside(self.path, RUN_FILES)
        self.found: Literal["", "begun", "finished"] = ""
        """How far the run was that `claim` found in the folder; empty if it has to start."""

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
        """Whether the run in it has both a checkpoint and results, with all that belongs to them."""
        written = (self.path / RESULTS).is_file() and (self.path / ELASTIC / CONFIG).is_file()
        return written and not (self.path / COMPARING).exists()

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Context in which the results of a run are written: killed in it, the run is not finished."""
        write_text(self.path / COMPARING, "")
        yield
        (self.path / COMPARING).unlink(missing_ok=True)

    def lock(self) -> None:
        """Makes the folder if need be, and keeps other runs out of it until `release` or the end of the process.

        What killed runs left half-written is removed, and what they were replacing is put back.

        Raises:
            RunFolderError: If another process is at work in it, naming that process, or it cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._aside.put_back()  # a run that was killed before it began
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
        """Lets other runs in again; a run that was to be overwritten is put back if the new one has not begun."""
        if self._lock.held:
            with suppress(OSError):  # the next start tries again
                self._aside.put_back()
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
        return names + ([CHECKPOINTS] if any((self.path / CHECKPOINTS).glob(TRAINING_CHECKPOINTS)) else [])

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
            self._set_aside()
        self.found = "finished" if self.finished else "begun" if self.epochs_kept else ""
        config = self.path / RUN_CONFIG
        stored = self._refuse_others(recipe)
        if stored is not None:
            if not list(differing_keys_of_runs(stored, recipe)):
                if stored != recipe and not self.finished:
                    write_text(config, _HEADING + yaml.safe_dump(recipe, sort_keys=False))
                return True
            for name in _FROM_ANOTHER_RECIPE:
                remove(self.path / name)
            for logged in (self.path / CSV_LOG).glob("version_*"):
                remove(logged)
        write_text(config, _HEADING + yaml.safe_dump(recipe, sort_keys=False))
        return False

    def _refuse_others(self, recipe: dict[str, Any]) -> dict[str, Any] | None:
        """Makes sure that the folder holds no other run and nothing that no run has written; gives the recipe of its run."""
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
        elif work:
            raise RunFolderError(
                f"{self.path} holds {', '.join(work)} but no {RUN_CONFIG}, so what made them is unknown. Give another "
                "trainer.default_root_dir, or --overwrite to remove them"
            )
        elif os.path.lexists(config) and not self._has_heading():
            raise RunFolderError(
                f"{config} is there and no run has written it: it would be replaced. Give another "
                "trainer.default_root_dir, or move that file"
            )
        return stored

    def check_place(self) -> None:
        """Makes sure that the folder can be made and written to and no other process is at work in it; writes nothing.

        Raises:
            RunFolderError: If it cannot, naming that process or what stands in the way.
        """
        try:
            place = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if os.path.lexists(p))
            reason = "" if place.is_dir() else f"{_shortened(place)} is no folder"
            if not reason and not (os.access(place, os.W_OK | os.X_OK) or self.finished):
                reason = f"no right to write to {_shortened(place)}"
        except (OSError, ValueError) as error:  # a name that no folder can have
            reason = _reason(error)
        if reason:
            raise RunFolderError(
                f"{_shortened(self.path)}: this folder cannot be made or written to ({reason}); give another"
            )
        self._lock.check_free()

    def check_claim(self, recipe: dict[str, Any], overwrite: bool) -> None:
        """Raises what `lock` and `claim` would raise, and writes nothing.

        Args:
            recipe: The full recipe.
            overwrite: Whether another run may be removed.

        Raises:
            RunFolderError: If the folder cannot be made or written to, another process is at work in it, or it holds another
                run or files that are no run.
        """
        self.check_place()
        if not overwrite:
            self._refuse_others(recipe)

    def begin(self) -> None:
        """Removes the run that is overwritten: model, text and recipe of the new one are known to be good."""
        self._aside.forget()

    def _stored_recipe(self) -> dict[str, Any] | None:
        """The recipe of the run that the folder holds; None if no run has written one, or it is damaged and began nothing."""
        config, work = self.path / RUN_CONFIG, self.finished_work
        if not config.exists():
            return None
        try:
            stored = read_yaml(config)
            problem = "" if _may_be_a_recipe(stored) else f"{config} holds no recipe"
        except FileError as error:
            stored, problem = None, str(error)
        if problem and work:
            raise RunFolderError(
                f"{problem}, so what made {', '.join(work)} beside it is unknown. Put a copy of it back, give another "
                "trainer.default_root_dir, or --overwrite to remove the run"
            )
        return None if problem or not (work or self._has_heading()) else stored

    def _has_heading(self) -> bool:
        """Whether config.yaml was written by a run, however damaged it may be by now."""
        try:
            return read_text(self.path / RUN_CONFIG).startswith(_HEADING)
        except FileError:
            return False

    def _set_aside(self) -> None:
        """Sets aside what a run writes, and nothing else.

        Raises:
            RunFolderError: If something cannot be moved.
        """
        try:
            self._aside.put()
        except OSError as error:
            self._aside.put_back()
            raise RunFolderError(
                f"--overwrite: {error.filename or self.path} cannot be removed ({_reason(error)}); remove it by hand, or "
                "give another trainer.default_root_dir"
            ) from error

    def newest_checkpoint(self, can_be_read: Callable[[Path], bool]) -> tuple[Path | None, list[Path]]:
        """The newest training checkpoint that is whole.

        Args:
            can_be_read: Whether one whose bytes are those that were written can be read.

        Returns:
            Its path, or None; and the newer ones that are damaged.
        """
        damaged: list[Path] = []
        for path in sorted((self.path / CHECKPOINTS).glob(TRAINING_CHECKPOINTS), key=_epoch, reverse=True):
            if _has_its_hash(path) and can_be_read(path):
                return path, damaged
            damaged.append(path)
        return None, damaged

    @property
    def epochs_kept(self) -> int:
        """Epochs done by the newest training checkpoint that was written to its end; damage is not looked for."""
        found = (self.path / CHECKPOINTS).glob(TRAINING_CHECKPOINTS)
        return max((_epoch(path) + 1 for path in found if path.with_suffix(".sha256").is_file()), default=0)

    def drop_checkpoints_after(self, epochs_done: int) -> None:
        """Removes the training checkpoints written after `epochs_done` epochs."""
        for path in (self.path / CHECKPOINTS).glob(TRAINING_CHECKPOINTS):
            if _epoch(path) >= epochs_done:
                path.unlink()
                path.with_suffix(".sha256").unlink(missing_ok=True)

    def retries(self) -> dict[int | None, int]:
        """How often each block, or the stages of the whole model (None), were started anew after NaN or infinity.

        Raises:
            RunFolderError: If retries.json is damaged.
        """
        path = self.path / RETRIES
        try:
            stored = read_mapping(path) if path.is_file() else {}
            if not all(
                (k == _WHOLE_MODEL or k.isdecimal()) and type(v) is int and 0 <= v < 100 for k, v in stored.items()
            ):
                raise FileError(f"{path} should say how often each block was started anew, and says {str(stored)[:80]}")
        except FileError as error:
            raise RunFolderError(
                f"{error}. Remove the file: the run goes on, and blocks that were started anew have their full learning rates"
            ) from error
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
