"""Builds what every strategy of a grid names, before the first cell runs: hours later is too late for a typo."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from mobiq_lightning.comparison.grid import Cell
from mobiq_lightning.errors import MobiqError, RecipeError
from mobiq_lightning.jobs import build


def check_cells(cells: Sequence[Cell]) -> None:
    """Builds each strategy once.

    Raises:
        RecipeError: Naming every strategy that cannot be built, and why.
    """
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        for strategy, cell in {cell.strategy: cell for cell in cells}.items():
            # No logger: building one of W&B would start a run.
            trainer = {**cell.recipe["trainer"], "logger": False, "default_root_dir": folder}
            try:
                build({**cell.recipe, "trainer": trainer})
            except (MobiqError, ModuleNotFoundError) as error:
                message = str(error).strip().replace("\n", "\n    ")
                problems.append(f"strategies.{strategy}: {message}")
    if problems:
        raise RecipeError("\n".join(problems))
