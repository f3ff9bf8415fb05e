"""Reads the grid of a comparison from its YAML and makes the cells that follow from it. Imports nothing heavy."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobiq_lightning.comparison.file_names import CELLS, SHARED
from mobiq_lightning.comparison.grid_schema import KEYS, name_problems, schema_problems
from mobiq_lightning.errors import RecipeError, shown
from mobiq_lightning.input_files import is_file
from mobiq_lightning.jobs import GROUPS, check_key, check_recipe, read_recipe, recipe_path

RULES_SEEDS = 3
"""With fewer seeds than this, a comparison says that its spreads mean little."""
_SET_BY_GRID = ("seed_everything", "data.seed", "model.random_seeds", "model.shared_work", "trainer.default_root_dir")
"""Keys that every cell has from the grid itself; a change of them would be overwritten."""
PARTS = ("model", "data", "trainer")
"""Keys of a recipe that hold all others."""
_SAME_FOR_ALL = ("model.pretrained", "model.dtype", "data.eval_")
"""Keys, or their beginnings, in which strategies of one comparison must not differ."""


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: a strategy with a seed.

    Args:
        strategy: Name of the strategy in the grid.
        seed: Seed of everything random in the run, and of the choice of calibration windows.
        recipe: The full recipe of the run.
        changes: Values that the strategy changes in the base recipe, by dotted key.
        folder: The run folder.
    """

    strategy: str
    seed: int
    recipe: dict[str, Any]
    changes: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """The name of the cell in messages, such as ``budgets, seed 0``."""
        return f"{self.strategy}, seed {self.seed}"

    @property
    def slug(self) -> str:
        """The name of the cell in file names, such as ``budgets-seed-0``."""
        return f"{self.strategy}-seed-{self.seed}"


@dataclass
class Grid:
    """The grid of a comparison, as its YAML describes it: strategies, seeds, and the recipe that they share.

    Args:
        name: Name of the comparison; its runs carry it as W&B group.
        recipe: Base recipe of all strategies: its path, relative to the grid's file, or the name of a shipped recipe.
        strategies: For each strategy, the keys of the recipe that it changes.
        seeds: Seeds; every strategy runs once with each.
        bits: Used bits per weight at which strategies are compared.
        folder: Folder of runs, tables and report; by default ``runs/compare/`` and the name.
        title: Heading of the report; by default the name.
        changes: Keys of the base recipe that the comparison changes for all strategies.
        workers: Cells that run at the same time; `auto`: one per GPU, or one on a machine without.
        wandb: Arguments of `WandbLogger` such as project or offline; without it nothing is logged to W&B.
        path: File that the grid was read from.
    """

    name: str
    recipe: str
    strategies: dict[str, dict[str, Any]]
    seeds: list[int]
    bits: list[float]
    folder: str = ""
    title: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    workers: int | str = "auto"
    wandb: dict[str, Any] | None = None
    path: Path = field(default_factory=Path)

    @property
    def root(self) -> Path:
        """The folder of the comparison: `folder`, or by default ``runs/compare/`` and the name."""
        return Path(self.folder or f"runs/compare/{self.name}")

    def base(self) -> dict[str, Any]:
        """The recipe that all strategies share, as its file says it.

        Raises:
            RecipeError: If it cannot be read.
        """
        path = self.path.parent / self.recipe
        return read_recipe(str(path) if is_file(path) else recipe_path(self.recipe))

    def cells(self) -> list[Cell]:
        """Makes all cells, ordered by seed, so that a comparison that is stopped early has whole seeds.

        Raises:
            RecipeError: If a recipe cannot be read.
        """
        found, base = [], self.base()
        for seed in self.seeds:
            for strategy, changes in self.strategies.items():
                folder = self.root / CELLS / f"{strategy}-seed-{seed}"
                recipe = self._recipe(base, strategy, seed, folder)
                found.append(Cell(strategy, seed, recipe, flatten(changes), folder))
        return found

    def _recipe(self, base: dict[str, Any], strategy: str, seed: int, folder: Path) -> dict[str, Any]:
        """The base recipe with the changes of the grid, then those of the strategy, then what every cell must have."""
        recipe = copy.deepcopy(base)
        for key, value in {**flatten(self.changes), **flatten(self.strategies[strategy])}.items():
            put(recipe, key, value)
        for part in PARTS:
            recipe[part] = recipe.get(part) or {}
        model, data, trainer = recipe["model"], recipe["data"], recipe["trainer"]
        recipe["seed_everything"] = data["seed"] = seed
        model.setdefault("eval_bits", list(self.bits))
        model["random_seeds"] = [seed]  # the draws of different cells differ; their spread is that over seeds
        model["shared_work"] = str(self.root / SHARED)
        trainer["default_root_dir"] = str(folder)
        if self.wandb is not None:
            trainer["logger"] = {
                "class_path": "mobiq_lightning.loggers.WandbLogger",
                "init_args": {**self.wandb, "group": self.name, "name": f"{strategy}-seed-{seed}"},
            }
        return recipe


def read_grid(path: str) -> Grid:
    """Reads and checks the YAML of a comparison.

    Raises:
        RecipeError: If anything in it is wrong; the message has a line for each thing.
    """
    if path.startswith("{"):
        raise RecipeError(f"compare: a grid is a file, or the name of a shipped one, and not its content: {path[:60]}")
    content = read_recipe(path)
    _raise_all(path, schema_problems(content))
    grid = Grid(**content, path=Path(path))
    check_grid(grid)
    return grid


def check_grid(grid: Grid) -> None:
    """Checks of a grid, and of the recipes of its cells, all that can be told without importing a class.

    Raises:
        RecipeError: If anything is wrong; the message has a line for each thing.
    """
    content = {name: getattr(grid, name) for name in KEYS}
    for found in (schema_problems, name_problems):
        _raise_all(grid.path, found(content))
    _raise_all(grid.path, _recipe_problems(grid))


def _raise_all(path: str | Path, problems: Iterable[str]) -> None:
    lines = [f"{path}: {problem}" for problem in dict.fromkeys(problems)]
    if lines:
        raise RecipeError("\n".join(lines))


def _recipe_problems(grid: Grid) -> Iterator[str]:
    for name, changes in {
        "changes": grid.changes,
        **{f"strategies.{n}": c for n, c in grid.strategies.items()},
    }.items():
        flat = flatten(changes)
        wrong = [problem for key in flat for problem in check_key(key.split("."))]
        wrong += [f"{key}: {shown(flat[key])}; a mapping of keys to values is expected" for key in PARTS if key in flat]
        wrong += [f"{key}: the grid itself sets it in every cell" for key in flat if key in _SET_BY_GRID]
        if name != "changes":
            other = [key for key in flat if key.startswith(_SAME_FOR_ALL)]
            wrong += [
                f"{key}: strategies are compared on one model and one text; set it under changes" for key in other
            ]
        yield from (f"{name}: {problem}" for problem in wrong)
        if wrong:
            return
    wrong = [f"recipe: {problem}" for problem in check_recipe(grid.base())]
    yield from wrong
    for cell in grid.cells() if not wrong else ():
        yield from (f"strategies.{cell.strategy}: {problem}" for problem in check_recipe(cell.recipe))


def flatten(changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Turns nested changes of a recipe into changes by dotted key: ``{model: {budget: x}}`` into ``{model.budget: x}``.

    Keys of groups are changed one by one: ``{model.rates: {ranges: x}}`` leaves the other rates as they are.
    """
    flat: dict[str, Any] = {}
    for key, value in (changes or {}).items():
        if key in (*PARTS, *GROUPS) and isinstance(value, dict):
            flat |= flatten({f"{key}.{inner}": found for inner, found in value.items()})
        else:
            flat[str(key)] = value
    return flat


def put(recipe: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key of a recipe in place. A class as value replaces the class before it, arguments included."""
    *parents, last = key.split(".")
    inner = recipe
    for parent in parents:
        known = inner.get(parent)
        if not isinstance(known, dict):  # a class may be given by its name alone
            inner[parent] = {"class_path": known} if isinstance(known, str) else {}
        inner = inner[parent]
    inner[last] = copy.deepcopy(value)


def override(grid: Grid, arguments: Sequence[tuple[str, Any]]) -> None:
    """Adds keys of the command line, such as ``model.pretrained``, to what the grid changes for all strategies.

    Args:
        grid: The grid, which is changed in place.
        arguments: Dotted keys of the recipe with their values.

    Raises:
        RecipeError: If the recipe has no such key, or a strategy sets it itself.
    """
    for key, value in arguments:
        problems = check_key(key.split("."))
        setters = [name for name, changes in grid.strategies.items() if key in flatten(changes)]
        if setters:
            problems = [f"--{key}: the strategies {', '.join(setters)} set it themselves; change it in {grid.path}"]
        if problems:
            raise RecipeError("\n".join(problems))
        grid.changes = {**flatten(grid.changes), key: value}
