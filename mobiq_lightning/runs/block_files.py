"""Blocks of a run that processes have calibrated by themselves: a file for each that is done, a lock for each in work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from mobiq_lightning.console import say
from mobiq_lightning.errors import RunFolderError
from mobiq_lightning.files import remove_leftovers, sha256
from mobiq_lightning.runs.file_names import BLOCKS, CHECKPOINTS
from mobiq_lightning.runs.lock import FolderLock
from mobiq_lightning.runs.training_checkpoints import TrainingCheckpoints

_FILE = re.compile(r"block-(?P<number>\d{6})-(?P<hash>[0-9a-f]{64})\.part")
"""Names of the files of finished blocks, with the number of the block, from 1, and the SHA-256 of their bytes."""
_LOCK = re.compile(r"block-(?P<number>\d{6})\.lock")


class BlockFiles:
    """What lies in the folder of a run that single processes leave the blocks in which they calibrate.

    Args:
        run: The run folder; it need not exist.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / BLOCKS
        self._run = run
        self._locks: list[FolderLock] = []

    def work_folder(self, blocks: range) -> Path:
        """Where the process that calibrates some blocks, by index from 0, keeps its training checkpoints and metrics."""
        return self.folder / (f"{blocks.stop}" if len(blocks) == 1 else f"{blocks.start + 1}-{blocks.stop}")

    @staticmethod
    def named(block: int, hashed: str = "") -> str:
        """Name of the file of a block, by index from 0, whose bytes have a SHA-256 in hex; what it is written as without one."""
        return f"block-{block + 1:06d}{hashed and '-'}{hashed}.part"

    def found(self) -> Iterator[tuple[int, Path]]:
        """The files of finished blocks, whole or not, each with the index of its block, in order."""
        for path in sorted(self.folder.glob("block-*.part")):
            if match := _FILE.fullmatch(path.name):
                yield int(match["number"]) - 1, path

    def whole(self, blocks: range | None = None) -> dict[int, Path]:
        """The files of finished blocks, by index; those whose bytes are not what was written are named, and removed.

        Args:
            blocks: Those that are asked for; all by default.
        """
        files: dict[int, Path] = {}
        for block, path in self.found():
            if block in files or (blocks is not None and block not in blocks):
                continue
            with suppress(FileNotFoundError):
                if path.name == self.named(block, sha256(path)):
                    files[block] = path
                    continue
                say(f"{path} is damaged; block {block + 1} is calibrated again.")
                path.unlink()
        return files

    @property
    def hold_work(self) -> bool:
        """Whether something is there that took time."""
        kept = any(TrainingCheckpoints(path).are_there for path in self.folder.glob(f"*/{CHECKPOINTS}"))
        return kept or any(True for _ in self.found())

    @property
    def in_work(self) -> bool:
        """Whether a process is at work on some."""
        return self._busy() is not None

    def lock(self, blocks: Iterable[int]) -> None:
        """Keeps other processes from some blocks, by index, until `release` or the end of this one; from all or none.

        Raises:
            RunFolderError: If another process is at work on one of them, naming it.
            OSError: If the folder cannot be made or written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for block in blocks:
                lock = self._lock_of(block)
                lock.acquire()
                self._locks.append(lock)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Lets other processes calibrate the blocks again."""
        for lock in self._locks:
            lock.release()
        self._locks = []

    @property
    def lost(self) -> bool:
        """Whether blocks were locked, and somebody has removed the folder since."""
        return any(lock.lost for lock in self._locks)

    def check_free(self) -> None:
        """Makes sure that no process is at work on single blocks.

        Raises:
            RunFolderError: If one is, naming it and the block.
        """
        if busy := self._busy():
            raise busy

    def drop_training(self, blocks: range) -> None:
        """Removes the training checkpoints of a process whose blocks are done; its metrics stay."""
        shutil.rmtree(self.work_folder(blocks) / CHECKPOINTS, ignore_errors=True)

    def clear(self) -> None:
        """Removes blocks and training checkpoints, when the run that has taken them over is finished; metrics stay."""
        remove_leftovers(self.folder)
        for _, path in self.found():
            path.unlink(missing_ok=True)
        for path in self.folder.glob(f"*/{CHECKPOINTS}"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("block-*.lock"):
            path.unlink(missing_ok=True)  # of processes that were killed
        with suppress(OSError):
            self.folder.rmdir()  # if there are no metrics either

    def _lock_of(self, block: int) -> FolderLock:
        path = self.folder / f"block-{block + 1:06d}.lock"
        return FolderLock(path, f"{self._run}, block {block + 1}", "on it")

    def _busy(self) -> RunFolderError | None:
        """What is said of the first block that another process is at work on; None if there is none."""
        for path in sorted(self.folder.glob("block-*.lock")):
            if match := _LOCK.fullmatch(path.name):
                try:
                    self._lock_of(int(match["number"]) - 1).check_free()
                except RunFolderError as error:
                    return error
        return None
