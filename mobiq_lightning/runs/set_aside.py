"""A run that is about to be overwritten: set aside until the new one has begun, and put back if that does not come to it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mobiq_lightning.console import say
from mobiq_lightning.files import is_leftover, remove
from mobiq_lightning.runs.file_names import ASIDE, CHECKPOINTS
from mobiq_lightning.runs.training_checkpoints import OURS


class SetAside:
    """Keeps the files of a run in a folder within the run folder; a link in place of checkpoints/ stays where it is.

    Args:
        folder: The run folder.
        names: Names of the files and folders that a run writes.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    def put(self) -> None:
        """Sets aside what is there. If it is killed half-way, `put_back` undoes it."""
        for path, aside in self._places():
            for name in self._names_in(path):
                aside.mkdir(parents=True, exist_ok=True)
                os.replace(path / name, aside / name)

    def put_back(self) -> None:
        """Puts back what was set aside, in place of what a start that failed has left; does nothing if nothing was."""
        for path, aside in self._places():
            remove(_forgotten(aside))
            for kept in sorted(aside.iterdir()) if aside.is_dir() else ():
                remove(path / kept.name)
                os.replace(kept, path / kept.name)
            remove(aside)

    def forget(self) -> None:
        """Removes what was set aside, but not what links in it lead to. Killed half-way, it does not come back in parts."""
        for _, aside in self._places():
            if not aside.is_dir():
                continue
            gone = _forgotten(aside)
            os.replace(aside, gone)
            for kept in sorted(gone.iterdir()):
                if kept.is_symlink():
                    say(f"{kept.name} was a link; the link is removed, and what it leads to is left alone.")
                remove(kept)
            remove(gone)

    def _places(self) -> Iterator[tuple[Path, Path]]:
        """Folders in which files of the run are, each with where they are set aside."""
        yield self.folder, self.folder / ASIDE
        checkpoints = self.folder / CHECKPOINTS
        if checkpoints.is_symlink() and checkpoints.is_dir():
            yield checkpoints, checkpoints / ASIDE

    def _names_in(self, path: Path) -> list[str]:
        """Names of what is set aside of a folder: of one that a link leads to, training checkpoints alone."""
        if path == self.folder:
            there = [name for name in self.names if os.path.lexists(path / name)]
            return [name for name in there if not (name == CHECKPOINTS and (path / name).is_symlink())]
        return [inner.name for inner in path.iterdir() if OURS.fullmatch(inner.name) or is_leftover(inner.name)]


def _forgotten(aside: Path) -> Path:
    """The name under which a folder is that is being removed."""
    return aside.with_name(f"{aside.name}.gone")
