"""Names of the files and folders of a comparison, each with who writes it."""

from __future__ import annotations

from mobiq_lightning.runs import WANDB

COMPARISON = "comparison.json"
"""File with the grid and the recipes of its cells; written by `ComparisonFolder.claim`."""
CELLS = "cells"
"""Folder of the run folders; written by the cells themselves."""
CELL = "cell.json"
"""File with time and memory of a cell, in its run folder; written by `run_cell` when the run is done."""
RECIPES = "recipes"
"""Folder of the recipes of the cells; written by `Workers`."""
LOGS = "logs"
"""Folder of the logs, which hold what the cells print; written by `Workers`."""
SHARED = "shared"
"""Folder of results that all cells share, so that only one of them computes each; written by `SharedWork`."""
ROWS = "results.jsonl"
"""File with the rows of all finished cells; written by `ComparisonFolder.write_rows`."""
TABLE = "table.json"
"""File with the long table, verdicts, cells, protocol and environment; written by `publish`."""
TABLE_CSV = "table.csv"
"""File with the long table alone; written by `publish`."""
REPORT = "report.html"
"""File with the report; written by `write_report`, with a PNG beside it for each chart."""
COMPARISON_FILES = (COMPARISON, CELLS, RECIPES, LOGS, SHARED, ROWS, TABLE, TABLE_CSV, REPORT, WANDB)
"""Names of all that a comparison writes into its folder, and that starting it anew removes together with the PNGs."""
COMPARISON_FOLDERS = (CELLS, RECIPES, LOGS, SHARED, WANDB)
"""Those of them that are folders; all others are files."""
