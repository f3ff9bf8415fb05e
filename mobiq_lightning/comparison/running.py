"""Runs a grid of strategies and seeds, or resumes it, and publishes what it found."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobiq_lightning.comparison.grid import RULES_SEEDS, Cell, Grid, check_grid, flatten, override, read_grid
from mobiq_lightning.console import MODULE, say
from mobiq_lightning.errors import MobiqError, RecipeError, shown
from mobiq_lightning.extras import require
from mobiq_lightning.jobs import (
    GRIDS,
    disk_errors,
    interruptible,
    override_arguments,
    recipe_path,
    values_of,
    without_effect,
)
from mobiq_lightning.runs import RunFolder

if TYPE_CHECKING:
    from mobiq_lightning.comparison.folder import ComparisonFolder


def compare(
    grid: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    bits: Sequence[float] | None = None,
    folder: str | Path | None = None,
    workers: int | str | None = None,
    overwrite: bool = False,
    **overrides: Any,
) -> ComparisonFolder:
    """Runs strategies with several seeds, each as a run of its own, and compares them at equal used bits.

    What is finished is kept: the same call goes on with a comparison that was interrupted.

    Args:
        grid: Path of a grid, or name of a shipped one such as ``"budgets"``.
        seeds: Seeds instead of the grid's.
        bits: Used bits per weight of the table instead of the grid's.
        folder: Folder of runs, tables and the report, instead of the grid's folder.
        workers: Cells that run at the same time instead of the grid's number; ``"auto"``: one per GPU, or one.
        overwrite: Whether to remove what the folder holds of a comparison first.
        **overrides: Keys of the recipe, for all strategies: ``model=dict(pretrained="path/to/model")`` or
            ``**{"model.pretrained": "path/to/model"}``.

    Returns:
        The folder of the comparison, with table.csv, table.json and report.html.

    Raises:
        RecipeError: If the grid or an argument is wrong.
        RunFolderError: If the folder holds other runs, or another process is at work in it.
        MobiqError: At the end, if cells failed.
    """
    require("calibrate", "compare")
    if not isinstance(grid, (str, Path)):
        raise RecipeError(
            f"compare: a grid is given by its path or by the name of a shipped one, not as {type(grid).__name__}"
        )
    if not isinstance(overwrite, bool):
        raise RecipeError(f"compare: overwrite ({shown(overwrite)}) must be True or False")
    given = {"seeds": seeds, "bits": bits, "folder": folder, "workers": workers}
    changes = {name: value for name, value in given.items() if value is not None}
    read = changed_grid(recipe_path(str(grid), GRIDS), changes, overrides)
    cells = read.cells()
    from mobiq_lightning.comparison.check import check_cells, without_speed

    check_cells(cells)
    for strategy, recipe in {cell.strategy: cell.recipe for cell in cells}.items():
        for line in without_effect(values_of(recipe)):
            say(f"strategies.{strategy}: {line}.")
    cells = [without_speed(cell) for cell in cells]
    kept = "finished cells and epochs are kept; the same command goes on"
    with interruptible(kept) as told, disk_errors(lambda: told.how_it_goes_on()), RunFolder(read.root).locked():
        return _run(read, cells, overwrite, _as_command(read.path, changes, overrides))


def changed_grid(path: str, changes: Mapping[str, Any], overrides: Mapping[str, Any]) -> Grid:
    """Reads a grid, applies the changes that a call makes to it, and checks it.

    Args:
        path: File of the grid.
        changes: Seeds, bits, folder and workers, as far as they are changed.
        overrides: Keys of the recipe, for all strategies.

    Raises:
        RecipeError: If anything is wrong; the message has a line for each thing.
    """
    grid = read_grid(path)
    for name, value in changes.items():
        listed = isinstance(value, (tuple, range))
        setattr(grid, name, list(value) if listed else str(value) if isinstance(value, Path) else value)
    override(grid, list(flatten(overrides).items()))
    check_grid(grid)
    return grid


def _as_command(path: Path, changes: Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    """The command line that does the same, for the report."""
    parts = ["--config", str(path)]
    for name, value in changes.items():
        parts.append(f"--{name}={','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    parts += override_arguments(overrides)
    return f"{MODULE} compare {shlex.join(parts)}"


def _run(grid: Grid, cells: Sequence[Cell], overwrite: bool, command: str) -> ComparisonFolder:
    from mobiq_lightning.comparison.folder import ComparisonFolder
    from mobiq_lightning.comparison.results import publish
    from mobiq_lightning.comparison.workers import Workers, visible_devices

    folder = ComparisonFolder(grid.root)
    left_out = folder.claim(grid, cells, overwrite)
    if left_out:
        say(f"{grid.root} also holds {', '.join(left_out)}, which the grid does not name; they are left out.")
    if len(grid.seeds) < RULES_SEEDS:
        seeds = f"{len(grid.seeds)} seed{'s' if len(grid.seeds) > 1 else ''}"
        say(f"{seeds}: with fewer than {RULES_SEEDS} no difference can be told from chance.")
    waiting = [cell for cell in cells if not folder.finished(cell)]
    devices = visible_devices()
    count = max(1, len(devices)) if grid.workers == "auto" else int(grid.workers)
    say(
        f"{grid.name}: {len(cells)} cells ({len(grid.strategies)} strategies x {len(grid.seeds)} seeds), "
        f"{len(cells) - len(waiting)} finished, {count} at a time, in {grid.root}"
    )
    failures: dict[str, str] = {}

    def finished(cell: Cell, reason: str) -> None:
        if reason:
            failures[cell.slug] = reason
        folder.write_rows(cells, failures)  # at once: nothing finished is lost

    Workers(grid.root, count, devices).run(waiting, finished)
    publish(grid, folder, cells, failures, command)
    if damaged := folder.damaged(cells):
        lost = [f"{cell.name} ({cell.folder})" for cell in cells if cell.slug in damaged]
        raise MobiqError(
            f"{len(damaged)} of {len(cells)} cells are damaged: {'; '.join(lost)}. The others are in the table. Remove the "
            "folder of a damaged cell, and the same command runs it again"
        )
    if failures:
        names = [cell.name for cell in cells if cell.slug in failures]
        raise MobiqError(
            f"{len(failures)} of {len(cells)} cells failed: {'; '.join(names)}. The others are in the table. The same command "
            "tries the failed ones again"
        )
    return folder
