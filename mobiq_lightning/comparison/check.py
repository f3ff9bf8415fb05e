"""Builds the recipe of every strategy of a grid before the first cell runs, so that a typo is found at once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace

from mobiq_lightning.comparison.grid import Cell
from mobiq_lightning.errors import MobiqError, RecipeError
from mobiq_lightning.jobs import build
from mobiq_lightning.runs import loaded_class

_CALLBACKS = "mobiq_lightning.callbacks"
_QUIET = {"class_path": f"{_CALLBACKS}.LatencyCheck", "init_args": {"seconds": 0}}


def check_cells(cells: Sequence[Cell]) -> None:
    """Builds model, data and trainer of each strategy once, to see that its recipe can be run.

    Raises:
        RecipeError: If strategies cannot be built; the message names each, and why.
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


def without_speed(cell: Cell) -> Cell:
    """A copy of a cell whose run measures no speed, since speed measured while other cells run would mean nothing.

    A callback that measures speed says so itself, with a class attribute ``measures_speed`` that is true. Classes are looked
    up among those that are loaded, so `check_cells` comes first.
    """
    trainer = cell.recipe["trainer"]
    kept = [
        c for c in trainer.get("callbacks") or [] if not getattr(loaded_class(c, _CALLBACKS), "measures_speed", False)
    ]
    return replace(cell, recipe={**cell.recipe, "trainer": {**trainer, "callbacks": [*kept, _QUIET]}})
