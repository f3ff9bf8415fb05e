"""The recipe that a run keeps in its folder: what was run there, and the mark that a run has written it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mobiq_lightning.errors import FileError, RunFolderError
from mobiq_lightning.files import write_text
from mobiq_lightning.input_files import read_text, read_yaml
from mobiq_lightning.runs.same_recipe import located

_HEADING = "# The recipe of this run with every default written out; its first line tells that a run has written it.\n"


class RunRecipe:
    """The file in a run folder that says what was run there.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def is_of_a_run(self) -> bool:
        """Whether a run has written the file, however damaged it may be by now."""
        try:
            return read_text(self.path).startswith(_HEADING)
        except FileError:
            return False

    @property
    def is_of_somebody_else(self) -> bool:
        """Whether something is there that no run has written, and that would be lost if it were replaced."""
        return os.path.lexists(self.path) and not self.is_of_a_run

    def write(self, recipe: dict[str, Any]) -> None:
        """Writes a recipe, with the line that tells that a run has written it.

        Local models and texts are named by whole paths: the run is read from other directories than the one it was begun in.
        """
        write_text(self.path, _HEADING + yaml.safe_dump(located(recipe), sort_keys=False))

    def read(self, work: Sequence[str]) -> dict[str, Any] | None:
        """The recipe; None if no run has written one, or it is damaged and nothing was made from it.

        Args:
            work: Names of what lies beside it that took a run time.

        Raises:
            RunFolderError: If it is damaged, so that it is unknown what made that work.
        """
        if not self.path.exists():
            return None
        try:
            stored = read_yaml(self.path)
            problem = "" if _may_be_a_recipe(stored) else f"{self.path} holds no recipe"
        except FileError as error:
            stored, problem = None, str(error)
        if problem and work:
            raise RunFolderError(
                f"{problem}, so what made {', '.join(work)} beside it is unknown. Put a copy of it back, give another "
                "trainer.default_root_dir, or --overwrite to remove the run"
            )
        return None if problem or not (work or self.is_of_a_run) else stored


def _may_be_a_recipe(stored: Any) -> bool:
    trainer = stored.get("trainer") if isinstance(stored, dict) else 0
    return trainer is None or (isinstance(trainer, dict) and isinstance(trainer.get("callbacks"), (list, type(None))))
