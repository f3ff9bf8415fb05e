"""Names of the files and folders of a comparison, each with who writes it."""

from __future__ import annotations

from mobiq_lightning.runs import WANDB

COMPARISON = "comparison.json"
"""The grid and the recipes of its cells; written by `ComparisonFolder.claim`."""
CELLS = "cells"
"""Folder of the run folders; written by the cells themselves."""
CELL = "cell.json"
"""Time and memory of a cell, in its run folder; written by `run_cell` when the run is done."""
RECIPES = "recipes"
"""Folder of the recipes of the cells; written by `Workers`."""
LOGS = "logs"
"""Folder of what the cells print; written by `Workers`."""
SHARED = "shared"
"""Folder of what cells need only do once; written by `SharedWork`."""
ROWS = "results.jsonl"
"""Rows of all finished cells; written by `ComparisonFolder.write_rows`."""
TABLE = "table.json"
"""The long table with all that it comes from; written by `publish`."""
TABLE_CSV = "table.csv"
"""The long table alone; written by `publish`."""
REPORT = "report.html"
"""The report; written by `write_report`, with a PNG beside it for each chart."""
LOCK = ".lock"
"""Held by the process that runs the comparison; it stays behind."""

COMPARISON_FILES = (COMPARISON, CELLS, RECIPES, LOGS, SHARED, ROWS, TABLE, TABLE_CSV, REPORT, WANDB)
"""All that a comparison writes into its folder, and that starting it anew removes from there, beside the PNGs."""
