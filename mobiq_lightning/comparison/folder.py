"""Manages the folder of a comparison: whose it is, which cells are done, and what they measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobiq_lightning.comparison.cell import CellFigures
from mobiq_lightning.comparison.file_names import (
    CELL,
    CELLS,
    COMPARISON,
    COMPARISON_FILES,
    COMPARISON_FOLDERS,
    RECIPES,
    REPORT,
    ROWS,
    SHARED,
)
from mobiq_lightning.comparison.grid import Cell, Grid
from mobiq_lightning.comparison.table import CellRow
from mobiq_lightning.errors import FileError, ResultsError, RunFolderError
from mobiq_lightning.files import remove, remove_leftovers, write_json, write_text
from mobiq_lightning.input_files import is_file, read_text
from mobiq_lightning.runs import (
    RESULTS,
    Measured,
    Record,
    RunFolder,
    check_kinds,
    differing_keys,
    read_json,
    read_results,
)


@dataclass(frozen=True)
class _Stored(Record):
    """What is read of comparison.json.

    Args:
        cells: Recipes of all cells, by slug.
    """

    cells: Mapping[str, Mapping[str, Any]]


class ComparisonFolder:
    """The folder of one comparison: it knows which cells are finished and reads what they measured.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"ComparisonFolder({str(self.path)!r})"

    def claim(self, grid: Grid, cells: Sequence[Cell], overwrite: bool) -> list[str]:
        """Notes in comparison.json that the folder holds this grid, whose cells may be added to later, but not changed.

        Args:
            grid: The grid.
            cells: All cells of the grid.
            overwrite: Whether to remove what the folder holds of a comparison first.

        Returns:
            Names of cells that the folder holds and the grid no longer names.

        Raises:
            RunFolderError: If cells that were begun have another recipe now, cells are there without comparison.json, or a
                folder stands in place of a file.
            ResultsError: If comparison.json is damaged.
        """
        check_kinds(self.path, COMPARISON_FILES, COMPARISON_FOLDERS)
        remove_leftovers(self.path, COMPARISON_FILES)
        for name in (RECIPES, SHARED):
            remove_leftovers(self.path / name)
        if overwrite:
            self.clear()
        stored = self._stored()
        changed = [line for cell in cells for line in self._changes(cell, stored.get(cell.slug))]
        if changed:
            raise RunFolderError(
                f"{self.path} holds cells of this comparison with another recipe:\n  " + "\n  ".join(changed) + "\n"
                "Runs of two recipes cannot share a name. Give another folder (--folder), name the changed strategy "
                "anew, or --overwrite to remove what was run"
            )
        if not stored and (self.path / CELLS).exists():
            raise RunFolderError(f"{self.path} holds cells but no {COMPARISON}. Give another folder, or --overwrite")
        named = {cell.slug: cell.recipe for cell in cells}
        write_json(self.path / COMPARISON, {"grid": _as_json(asdict(grid)), "cells": _as_json({**stored, **named})})
        return sorted(set(stored) - set(named))

    def clear(self) -> None:
        """Removes the files and folders that a comparison writes, and nothing else; of links the links alone.

        Raises:
            RunFolderError: If something cannot be removed.
        """
        names = [name for name in COMPARISON_FILES if name != COMPARISON]
        try:
            for path in [*self.charts(), *(self.path / name for name in [*names, COMPARISON])]:
                remove(path)
        except OSError as error:
            raise RunFolderError(
                f"--overwrite: {error.filename or self.path} cannot be removed ({error.strerror or error}); remove it by "
                "hand, or give another folder"
            ) from error

    def charts(self) -> list[Path]:
        """PNGs of the charts that the report shows, in the order of their names; others in the folder are somebody's own."""
        try:
            report = read_text(self.path / REPORT)
        except FileError:
            return []
        return [path for path in sorted(self.path.glob("*.png")) if f'<section id="{path.stem}">' in report]

    def finished(self, cell: Cell) -> bool:
        """Whether a cell's run is finished, with its results and cell.json."""
        return RunFolder(cell.folder).finished and (cell.folder / CELL).is_file()

    def figures(self, cell: Cell) -> CellFigures:
        """The seconds and the memory that a finished cell took, from its cell.json.

        Raises:
            ResultsError: If cell.json is damaged.
        """
        path = cell.folder / CELL
        return CellFigures.from_json(read_json(path), path)

    def measured(self, cell: Cell) -> Measured:
        """The comparison that a finished cell has measured, from its results.json.

        Raises:
            ResultsError: If its results.json is damaged, or holds no comparison.
        """
        path = cell.folder / RESULTS
        measured = read_results(path).measured
        if measured is None:
            raise ResultsError(f"{path} holds no rows of a comparison; run `validate` with the recipe of {cell.name}")
        return measured

    def damaged(self, cells: Sequence[Cell]) -> dict[str, str]:
        """What is wrong with each finished cell whose results or figures cannot be read, by slug.

        Args:
            cells: Cells of the grid.
        """
        found = {}
        for cell in (cell for cell in cells if self.finished(cell)):
            try:
                self.measured(cell)
                self.figures(cell)
            except ResultsError as error:
                found[cell.slug] = str(error)
        return found

    def whole(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells that are finished and can be read."""
        damaged = self.damaged(cells)
        return [cell for cell in cells if self.finished(cell) and cell.slug not in damaged]

    def write_rows(self, cells: Sequence[Cell], failures: Mapping[str, str]) -> list[CellRow]:
        """Writes results.jsonl: a line for each row of each finished cell, and one for each that failed or is damaged.

        Args:
            cells: All cells of the grid.
            failures: Reasons by slug of the failed cell.

        Returns:
            The rows of the cells that are finished and can be read.
        """
        damaged = self.damaged(cells)
        rows: list[CellRow] = []
        lines: list[dict[str, Any]] = []
        for cell in cells:
            which = {"strategy": cell.strategy, "cell_seed": cell.seed}
            if cell.slug in damaged:
                lines.append({**which, "status": "damaged", "reason": damaged[cell.slug]})
            elif self.finished(cell):
                found = self.measured(cell).rows
                rows += [CellRow(cell.strategy, cell.seed, row) for row in found]
                lines += [{**which, "status": "finished", **row.to_json()} for row in found]
            elif cell.slug in failures:
                lines.append({**which, "status": "failed", "reason": failures[cell.slug]})
        write_text(self.path / ROWS, "".join(json.dumps(line) + "\n" for line in lines))
        return rows

    def _stored(self) -> dict[str, Any]:
        """Recipes of the cells that the folder was claimed for, by slug."""
        path = self.path / COMPARISON
        return dict(_Stored.from_json(read_json(path), path).cells) if is_file(path) else {}

    def _changes(self, cell: Cell, stored: dict[str, Any] | None) -> Iterator[str]:
        """Yields the keys in which the recipe of a cell that has finished an epoch differs from what the grid now says."""
        if stored is not None and RunFolder(cell.folder).finished_work:
            for difference in differing_keys(stored, _as_json(cell.recipe)):
                yield f"{cell.name}: {difference}"


def _as_json(value: Any) -> Any:
    """The value as JSON would return it: tuples become lists, and paths become texts."""
    return json.loads(json.dumps(value, default=str))
