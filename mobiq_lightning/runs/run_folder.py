"""The run folder: whose it is, how far it is, and what a command may do in it."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from mobiq_lightning.console import say
from mobiq_lightning.errors import RunFolderError
from mobiq_lightning.files import remove, remove_leftovers, write_text
from mobiq_lightning.runs.block_files import BlockFiles
from mobiq_lightning.runs.file_names import (
    BLOCKS,
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
    RUN_FOLDERS,
)
from mobiq_lightning.runs.lock import FolderLock
from mobiq_lightning.runs.place import check_kinds, obstacle, reason, shortened
from mobiq_lightning.runs.results import Results, read_results
from mobiq_lightning.runs.retries import Retries
from mobiq_lightning.runs.run_recipe import RunRecipe
from mobiq_lightning.runs.same_recipe import differing_keys_of_runs
from mobiq_lightning.runs.set_aside import SetAside
from mobiq_lightning.runs.training_checkpoints import TrainingCheckpoints

_FROM_ANOTHER_RECIPE = (IDENTITY, RETRIES, BLOCKS, HIDDEN_STATES, JOURNAL, PARTIAL)
"""What a run without a finished epoch may have left that another recipe has no use for. What the model wrote itself is kept:
its file names say what it depends on."""
_PATIENCE = 10.0
"""Seconds for which a process waits for others that are begun at the same time to have claimed their blocks."""
_WRITTEN_ATOMICALLY = (CHECKPOINTS, ELASTIC, PARTIAL, GENERATED)
"""Folders of a run in which a kill may leave what was not finished."""


class RunFolder:
    """A folder that holds one run.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FolderLock(self.path / LOCK)
        self._aside = SetAside(self.path, RUN_FILES)
        self._recipe = RunRecipe(self.recipe)
        self.training = TrainingCheckpoints(self.path / CHECKPOINTS)
        """What it keeps of the epochs that are done."""
        self.retries = Retries(self.path / RETRIES)
        """How often its blocks were started anew."""
        self.blocks = BlockFiles(self.path)
        """Blocks that processes calibrate by themselves."""
        self.found: Literal["", "begun", "finished"] = ""
        """How far the run was that `claim` found in the folder; empty if it has to start."""

    @classmethod
    def around(cls, recipe: Path) -> RunFolder | None:
        """The run folder that a recipe lies in, wherever that folder is now and whatever the recipe says of it.

        Args:
            recipe: A file.

        Returns:
            The folder that holds it, if a run has written it under this name and more beside it; a copy alone is a recipe.
        """
        folder = cls(recipe.parent)
        beside = [name for name in RUN_FILES if name != RUN_CONFIG and (folder.path / name).exists()]
        return folder if recipe.name == RUN_CONFIG and beside and folder._recipe.is_of_a_run else None

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
            RunFolderError: If another process is at work in it, or on single blocks of it, naming that process, or it cannot be
                made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self.blocks.check_free()
            self._aside.put_back()  # a run that was killed before it began
            restored = remove_leftovers(self.path, RUN_FILES)
            for name in _WRITTEN_ATOMICALLY:
                remove_leftovers(self.path / name)
        except RunFolderError:
            self._lock.release()
            raise
        except (OSError, ValueError) as error:  # a ValueError for a name with a zero byte
            self.release()
            if getattr(error, "errno", None) in (errno.EROFS, errno.EACCES) and self.finished:
                return  # nothing more is written there
            raise RunFolderError(
                f"{shortened(self.path)}: this folder cannot be made or written to ({reason(error)}); give another"
            ) from error
        for name in restored:
            say(f"{self.path / name} was being replaced when a run was killed; what it held before is back.")

    def release(self) -> None:
        """Lets other runs in again; a run that was to be overwritten is put back if the new one has not begun."""
        if self._lock.held:
            with suppress(OSError):  # the next start tries again
                self._aside.put_back()
        self._lock.release()
        self.blocks.release()

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
        if self._lock.lost or self.blocks.lost:
            raise RunFolderError(
                f"{self.path} was removed or moved away while its run was at work; the run ends. The same command starts it "
                "anew; where the folder was moved, give its new place as --trainer.default_root_dir to go on"
            )

    @property
    def finished_work(self) -> list[str]:
        """Names of what the folder holds that took a run time: training checkpoints, a checkpoint, results."""
        names = [name for name in (ELASTIC, RESULTS, OUTLIERS) if _holds_something(self.path / name)]
        names += [CHECKPOINTS] if self.training.are_there else []
        return names + ([BLOCKS] if self.blocks.hold_work else [])

    def claim(self, recipe: dict[str, Any], overwrite: bool) -> bool:
        """Makes the folder this recipe's; a run that has not finished an epoch gives way to a corrected recipe.

        Args:
            recipe: The full recipe.
            overwrite: Remove another run.

        Returns:
            Whether the folder already held a run of this recipe.

        Raises:
            RunFolderError: If it holds another run, files that are no run, or a folder in place of a file.
        """
        check_kinds(self.path, RUN_FILES, RUN_FOLDERS)  # before --overwrite sets aside what no run has written
        if overwrite:
            self._set_aside()
        self.found = "finished" if self.finished else "begun" if self.epochs_kept else ""
        stored = self._refuse_others(recipe)
        if stored is not None:
            if not list(differing_keys_of_runs(stored, recipe)):
                if stored != recipe and not self.finished:
                    self._recipe.write(recipe)
                return True
            for name in _FROM_ANOTHER_RECIPE:
                remove(self.path / name)
            for logged in (self.path / CSV_LOG).glob("version_*"):
                remove(logged)
        self._recipe.write(recipe)
        return False

    def claim_blocks(self, recipe: dict[str, Any], blocks: range) -> None:
        """Makes the folder this recipe's, and keeps other processes from some of its blocks until `release`.

        The folder itself is locked within it alone: processes with other blocks work in it at the same time.

        Args:
            recipe: The full recipe.
            blocks: The blocks, by index from 0.

        Raises:
            RunFolderError: If another process is at work on one of the blocks, or on the whole run, or if `claim` raises it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(patience=_PATIENCE)
            try:
                self.claim(recipe, overwrite=False)
                self.blocks.lock(blocks)
            finally:
                self._lock.release()
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{shortened(self.path)}: this folder cannot be made or written to ({reason(error)}); give another"
            ) from error

    def _refuse_others(self, recipe: dict[str, Any]) -> dict[str, Any] | None:
        """Makes sure that the folder holds no other run and nothing that no run has written; gives the recipe of its run."""
        work = self.finished_work
        stored = self._recipe.read(work)
        if stored is not None:
            differences = list(differing_keys_of_runs(stored, recipe))
            if differences and (work or self.blocks.in_work):
                raise RunFolderError(
                    f"{self.path} holds a run with another recipe:\n  " + "\n  ".join(differences) + "\n"
                    f"`fit {shlex.quote(str(self.path))}` goes on with the recipe that it has. Or give another "
                    "trainer.default_root_dir, or --overwrite to remove that run. To compare a finished run at other bits or "
                    "on other text, use `validate`"
                )
        elif work:
            raise RunFolderError(
                f"{self.path} holds {', '.join(work)} but no {RUN_CONFIG}, so what made them is unknown. Give another "
                "trainer.default_root_dir, or --overwrite to remove them"
            )
        elif self._recipe.is_of_somebody_else:
            raise RunFolderError(
                f"{self.recipe} is there and no run has written it: it would be replaced. Give another "
                "trainer.default_root_dir, or move that file"
            )
        return stored

    def differences(self, recipe: dict[str, Any]) -> list[str]:
        """Lines ``key: value of its run -> given value`` where a recipe differs from that of the run that is held, if known."""
        try:
            stored = self._recipe.read(self.finished_work)
        except RunFolderError:  # it is damaged: nothing is known of it
            return []
        return [] if stored is None else list(differing_keys_of_runs(stored, recipe))

    def check_place(self) -> None:
        """Makes sure that the folder can be made and written to and no other process is at work in it; writes nothing.

        Raises:
            RunFolderError: If it cannot, naming that process or what stands in the way.
        """
        problem = obstacle(self.path)
        if problem and not (os.path.isdir(self.path) and self.finished):  # noqa: PTH112 - a name may be too long for Path
            raise RunFolderError(
                f"{shortened(self.path)}: this folder cannot be made or written to ({problem}); give another"
            )
        check_kinds(self.path, RUN_FILES, RUN_FOLDERS)
        self._lock.check_free()
        self.blocks.check_free()

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
                f"--overwrite: {error.filename or self.path} cannot be removed ({reason(error)}); remove it by hand, or "
                "give another trainer.default_root_dir"
            ) from error

    @property
    def epochs_kept(self) -> int:
        """Epochs done by the newest training checkpoint that was written to its end; damage is not looked for."""
        return self.training.epochs_kept


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()
