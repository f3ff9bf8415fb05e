"""Logs the comparison's own run to Weights & Biases, beside those of its cells, in the same group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobiq_lightning.comparison.grid import Grid
from mobiq_lightning.comparison.report import ReportInput
from mobiq_lightning.loggers import WandbLogger, as_table


def log_comparison(grid: Grid, report: ReportInput, plots: Sequence[Path]) -> None:
    """Logs the long table, the verdicts and the plots to W&B as one run of job type ``compare``.

    Args:
        grid: Grid with the W&B arguments; it becomes the config of the run, nested as it is.
        report: Table and verdicts of the comparison.
        plots: PNG files of the report's charts.
    """
    import wandb

    settings: dict[str, Any] = {**(grid.wandb or {}), "group": grid.name, "name": grid.name, "job_type": "compare"}
    logger = WandbLogger(**settings)
    logger.use_folder(grid.root)
    logger.log_recipe({"grid": {**asdict(grid), "path": str(grid.path)}})
    run = logger.experiment
    run.log({"comparison": as_table([row.to_json() for row in report.table])})
    run.log({f"plots/{path.stem}": wandb.Image(str(path)) for path in plots})
    for row in report.table:
        if row.allocation == "router":
            run.summary[f"{row.strategy}/ppl_at_{row.used_bits:g}_bits"] = row.perplexity_mean
    run.summary["verdicts"] = "\n".join(report.verdicts)
    run.finish()
