"""Loggers: an append-only journal that every run keeps, and Weights & Biases that never stops a run."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mobiq_lightning.console import say
from mobiq_lightning.extras import require
from mobiq_lightning.runs import JOURNAL


class JsonlLogger(Logger):
    """Appends logged metrics to ``metrics.jsonl``, one JSON line each time; a resumed run goes on in the same file.

    Args:
        folder: Folder that the file is written to.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / JOURNAL
        self._folder_made = False

    @property
    def name(self) -> str:
        """The name of this logger, ``jsonl``, which Lightning asks for."""
        return "jsonl"

    @property
    def version(self) -> str:
        """An empty string: Lightning asks for a version, and the file has none."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends one line with the time in seconds, the step and the metrics."""
        if not self._folder_made:  # once: a run folder that somebody removes must not come back as half of one
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._folder_made = True
        line = {"time": round(time.time(), 3), "step": step, **{k: float(v) for k, v in metrics.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the recipe is kept as config.yaml beside the file."""


class WandbLogger(LightningWandbLogger):
    """Weights & Biases through Lightning's logger, offline where there is no key, so that it never stops a run.

    Args:
        project: Name of the W&B project.
        group: Name that runs of one comparison share.
        name: Name of the run.
        job_type: Kind of run, such as ``calibrate``.
        save_dir: Folder that offline runs are written to, in a folder ``wandb`` in it; by default the run folder.
        offline: Whether to write to disk only; by default as ``WANDB_MODE`` says, or if neither ``WANDB_API_KEY``
            nor a login is found. Where ``WANDB_MODE`` is ``disabled``, nothing is written at all.
    """

    def __init__(
        self,
        project: str = "mobiq-lightning",
        group: str | None = None,
        name: str | None = None,
        job_type: str = "calibrate",
        save_dir: str | None = None,
        offline: bool | None = None,
    ) -> None:
        require("wandb", "trainer.logger: WandbLogger")
        mode = (
            "disabled" if os.environ.get("WANDB_DISABLED", "").lower() == "true" else os.environ.get("WANDB_MODE", "")
        )
        if mode and offline is None:
            offline = mode in ("offline", "dryrun")
        if offline is None:
            offline = not _has_key()
            if offline:
                say("No W&B key found: the run is written offline; `wandb sync` its folder later.")
        super().__init__(name=name, save_dir=save_dir or ".", project=project, group=group, job_type=job_type)
        if mode == "disabled":
            self._wandb_init["mode"] = mode
            say("W&B is disabled (WANDB_MODE): nothing is logged there, and nothing is written.")
        elif offline:  # Lightning's own argument would put all later runs of the process offline
            self._wandb_init["mode"] = "offline"

    def use_folder(self, folder: Path) -> None:
        """Has the run written into a run folder, unless `save_dir` was given."""
        if self._save_dir in (".", None):
            self._save_dir = str(folder)
            self._wandb_init["dir"] = str(folder)

    def log_recipe(self, recipe: dict[str, Any]) -> None:
        """Records the recipe, nested as it is, as the config of the run."""
        self._wandb_init["config"] = recipe

    @rank_zero_only
    def plot_against_bits(self) -> None:
        """Has W&B draw what is measured at several budgets against the bits that were used, not against steps."""
        self.experiment.define_metric("eval/bits")
        for name in ("eval/ppl", "eval/kl"):
            self.experiment.define_metric(name, step_metric="eval/bits")

    @rank_zero_only
    def log_comparison(self, rows: list[dict[str, Any]], plot: Path) -> None:
        """Logs the rows of a comparison as a table, and its plot."""
        import wandb

        self.experiment.log({"comparison": as_table(rows), "comparison_plot": wandb.Image(str(plot))})


def as_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Turns rows that have the same keys into a `wandb.Table`."""
    import wandb

    columns = list(rows[0])
    return wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])


def _has_key() -> bool:
    """Whether W&B would find an API key, asked without touching the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")
