"""``compare``: runs a grid, resumes it, and says what it found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from mobiq_lightning.comparison.grid import RULES_SEEDS, Cell, Grid, check_grid, override, read_grid
from mobiq_lightning.errors import MobiqError, RecipeError, RunFolderError, nearest

HELP = """\
usage: python -m mobiq_lightning compare --config GRID.yaml [options] [--model.KEY VALUE ...]

Runs every strategy of a grid with every seed, each as a run of its own; the same command goes on with what is not finished.

options:
  --config GRID.yaml   the grid, as those in recipes/compare/
  --seeds 0,1,2        seeds instead of the grid's
  --bits 2,2.5,3       used bits of the table instead of the grid's
  --folder FOLDER      where runs, tables and the report go
  --workers N          cells that run at the same time; auto: one per GPU, or one
  --overwrite          remove what the folder holds of a comparison
  --model.KEY, --data.KEY, --trainer.KEY VALUE
                       keys of the recipe, for all strategies, as in --model.pretrained path/to/model
"""
_OPTIONS = ("config", "seeds", "bits", "folder", "workers", "overwrite", "help")


def compare(arguments: Sequence[str]) -> None:
    """Runs the comparison of a command line.

    Raises:
        RecipeError: If the grid or the command line is wrong.
        RunFolderError: If the folder holds other runs, or another process is at work in it.
        MobiqError: At the end, if cells failed.
    """
    grid, overwrite = _parse(arguments)
    if grid is None:
        print(HELP, end="")
        return
    cells = grid.cells()
    from filelock import FileLock, Timeout

    from mobiq_lightning.comparison.check import check_cells, without_speed
    from mobiq_lightning.comparison.file_names import LOCK

    check_cells(cells)
    cells = [without_speed(cell) for cell in cells]
    grid.root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(grid.root / LOCK, timeout=0):
            _run(grid, cells, overwrite, f"python -m mobiq_lightning compare {' '.join(arguments)}")
    except Timeout as error:
        raise RunFolderError(f"{grid.root}: another process runs this comparison; wait for it, or end it") from error


def _run(grid: Grid, cells: Sequence[Cell], overwrite: bool, command: str) -> None:
    from mobiq_lightning.comparison.folder import ComparisonFolder
    from mobiq_lightning.comparison.results import publish
    from mobiq_lightning.comparison.workers import Workers, visible_devices
    from mobiq_lightning.console import say

    folder = ComparisonFolder(grid.root)
    left_out = folder.claim(grid, cells, overwrite)
    if left_out:
        say(f"{grid.root} also holds {', '.join(left_out)}, which the grid does not name; they are left out.")
    if len(grid.seeds) < RULES_SEEDS:
        say(f"{len(grid.seeds)} seed(s): with fewer than {RULES_SEEDS} no difference can be told from chance.")
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
    if failures:
        names = [cell.name for cell in cells if cell.slug in failures]
        raise MobiqError(
            f"{len(failures)} of {len(cells)} cells failed: {'; '.join(names)}. The others are in the table. The same command "
            "tries the failed ones again"
        )


def _parse(arguments: Sequence[str]) -> tuple[Grid | None, bool]:
    """The grid of a command line, with what the command line changes of it; None if help is asked for."""
    options: dict[str, str] = {}
    recipe: list[tuple[str, Any]] = []
    pending = list(arguments)
    while pending:
        name, equals, value = pending.pop(0).partition("=")
        key = name.removeprefix("--")
        if name in ("-h", "--help"):
            return None, False
        if not name.startswith("--") or (key not in _OPTIONS and "." not in key):
            raise RecipeError(f"compare: {name}: no such option. {nearest(key, _OPTIONS)}".rstrip())
        if not equals and key != "overwrite":
            if not pending:
                raise RecipeError(f"compare: {name}: a value is missing")
            value = pending.pop(0)
        if "." in key:
            recipe.append((key, _value(value)))
        else:
            options[key] = value
    if "config" not in options:
        raise RecipeError("compare: --config is missing; give a grid, as in --config recipes/compare/budgets.yaml")
    grid = read_grid(options["config"])
    grid.folder = options.get("folder", grid.folder)
    grid.seeds = _numbers(options["seeds"]) if "seeds" in options else grid.seeds
    grid.bits = _numbers(options["bits"]) if "bits" in options else grid.bits
    if "workers" in options:
        grid.workers = _value(options["workers"])
    override(grid, recipe)
    check_grid(grid)
    return grid, "overwrite" in options


def _numbers(text: str) -> list[Any]:
    """``"0,1,2"`` or ``"[0, 1, 2]"`` as a list; what is no number stays text, which the grid's check refuses."""
    return [_value(part) for part in text.strip("[]").split(",") if part.strip()]


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"compare: {text!r} is not valid YAML: {error}") from error
