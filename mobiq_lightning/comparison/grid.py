"""Reads the grid of a comparison from its YAML and makes the cells that follow from it. Imports nothing heavy."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mobiq_lightning.comparison.file_names import CELLS, SHARED
from mobiq_lightning.errors import RecipeError, nearest
from mobiq_lightning.jobs import GROUPS, check_key, check_recipe, read_recipe, recipe_path

RULES_SEEDS = 3
"""With fewer seeds than this, a comparison says that its spreads mean little."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_SET_BY_GRID = ("seed_everything", "data.seed", "model.random_seeds", "model.shared_work", "trainer.default_root_dir")
"""Keys that every cell has from the grid itself; a change of them would be overwritten."""
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

    def cells(self) -> list[Cell]:
        """Makes all cells, ordered by seed, so that a comparison that is stopped early has whole seeds.

        Raises:
            RecipeError: If a recipe cannot be read.
        """
        found = []
        for seed in self.seeds:
            for strategy, changes in self.strategies.items():
                folder = self.root / CELLS / f"{strategy}-seed-{seed}"
                found.append(Cell(strategy, seed, self._recipe(strategy, seed, folder), flatten(changes), folder))
        return found

    def _recipe(self, strategy: str, seed: int, folder: Path) -> dict[str, Any]:
        """The base recipe with the changes of the grid, then those of the strategy, then what every cell must have."""
        path = self.path.parent / self.recipe
        recipe = copy.deepcopy(read_recipe(str(path) if path.is_file() else recipe_path(self.recipe)))
        for key, value in {**flatten(self.changes), **flatten(self.strategies[strategy])}.items():
            put(recipe, key, value)
        model, data, trainer = (recipe.setdefault(part, {}) for part in ("model", "data", "trainer"))
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
    read_recipe(path)  # says if there is no such file
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {error}") from error
    known = [name for name in Grid.__dataclass_fields__ if name != "path"]
    problems = [f"{key}: no such key. {nearest(key, known)}".rstrip() for key in content if key not in known]
    problems += [f"{key}: missing" for key in ("name", "recipe", "strategies", "seeds", "bits") if key not in content]
    if problems:
        raise RecipeError("\n".join(f"{path}: {problem}" for problem in problems))
    grid = Grid(**content, path=Path(path))
    check_grid(grid)
    return grid


def check_grid(grid: Grid) -> None:
    """Checks of a grid, and of the recipes of its cells, all that can be told without importing a class.

    Raises:
        RecipeError: If anything is wrong; the message has a line for each thing.
    """
    problems = [*_problems(grid)]
    if not problems:
        problems = list(dict.fromkeys(_recipe_problems(grid)))
    if problems:
        raise RecipeError("\n".join(f"{grid.path}: {problem}" for problem in problems))


def _problems(grid: Grid) -> Iterator[str]:
    if not isinstance(grid.seeds, list) or not all(type(seed) is int and seed >= 0 for seed in grid.seeds):
        yield f"seeds: {grid.seeds!r}; a list of whole numbers is expected, as in [0, 1, 2]"
    elif not grid.seeds:
        yield "seeds: none is given; a comparison without seeds has no spread. Give at least three, as in [0, 1, 2]"
    elif len(set(grid.seeds)) < len(grid.seeds):
        yield f"seeds: {grid.seeds} holds one twice; the same seed gives the same run"
    if not isinstance(grid.strategies, dict) or not grid.strategies:
        yield "strategies: none is given; name at least one, with the keys of the recipe that it changes"
        return
    if not isinstance(grid.bits, list) or not grid.bits or not all(isinstance(b, (int, float)) for b in grid.bits):
        yield f"bits: {grid.bits!r}; a list of numbers is expected, as in [2, 2.5, 3]"
    for name in [grid.name, *grid.strategies]:
        if not _NAME.fullmatch(str(name)):
            yield f"{name!r} cannot name a folder; use letters, digits and . _ + = -"
    lower: dict[str, str] = {}
    for name in map(str, grid.strategies):
        if name.lower() in lower:
            yield f"strategies: {lower[name.lower()]!r} and {name!r} would share a folder where case does not count"
        lower[name.lower()] = name
    if grid.workers != "auto" and (type(grid.workers) is not int or grid.workers < 1):
        yield f"workers: {grid.workers!r}; a number of at least 1, or auto"
    named: dict[str, Any] = {"changes": grid.changes, **grid.strategies}
    for name, changes in named.items():
        if not isinstance(changes or {}, dict):
            yield f"{name}: {changes!r}; a mapping from keys of the recipe to values is expected"


def _recipe_problems(grid: Grid) -> Iterator[str]:
    for name, changes in {
        "changes": grid.changes,
        **{f"strategies.{n}": c for n, c in grid.strategies.items()},
    }.items():
        wrong = [problem for key in flatten(changes) for problem in check_key(key.split("."))]
        wrong += [f"{key}: the grid itself sets it in every cell" for key in flatten(changes) if key in _SET_BY_GRID]
        if name != "changes":
            other = [key for key in flatten(changes) if key.startswith(_SAME_FOR_ALL)]
            wrong += [
                f"{key}: strategies are compared on one model and one text; set it under changes" for key in other
            ]
        yield from (f"{name}: {problem}" for problem in wrong)
        if wrong:
            return
    for cell in grid.cells():
        yield from (f"strategies.{cell.strategy}: {problem}" for problem in check_recipe(cell.recipe))


def flatten(changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Turns nested changes of a recipe into changes by dotted key: ``{model: {budget: x}}`` into ``{model.budget: x}``.

    Keys of groups are changed one by one: ``{model.rates: {ranges: x}}`` leaves the other rates as they are.
    """
    flat: dict[str, Any] = {}
    for key, value in (changes or {}).items():
        if key in ("model", "data", "trainer", *GROUPS) and isinstance(value, dict):
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


class _StrictLoader(yaml.SafeLoader):
    """Refuses a mapping that holds one key twice; YAML itself would keep the last in silence."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [str(loader.construct_object(key)) for key, _ in node.value]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        line = node.start_mark.line + 1
        raise yaml.YAMLError(f"line {line}: {', '.join(twice)} is there twice; two cells need two names")
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
