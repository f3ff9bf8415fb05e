"""Writes what the comparison measured: terminal table, results.json, results.csv, results.png, loggers."""

from __future__ import annotations

import json
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mobiq_lightning import __version__
from mobiq_lightning.callbacks.layerwise_calibration import checked
from mobiq_lightning.loggers import WandbLogger
from mobiq_lightning.module import ElasticCalibration
from mobiq_lightning.report import print_table, write_results
from mobiq_lightning.run_folder import RESULTS


class Results(Callback):
    """Ends every validation: one table on the terminal, the same rows in the run folder and in the loggers."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the rows on all ranks, writes them on the first."""
        module = checked(pl_module)
        assert module.comparison is not None
        rows = module.comparison.rows()
        bits_per_input = module.comparison.bits_per_input()
        if not trainer.is_global_zero:
            return
        results = {
            "model": module.pretrained,
            "protocol": trainer.datamodule.protocol,  # type: ignore[attr-defined]
            "environment": environment(),
            "slices": {
                "slice_bits": list(module.comparison.slice_bits),
                "overhead_bits": module.comparison.overhead_bits,
                "router_bits": module.comparison.router_bits,
                "threshold_scope": module.threshold_scope,
            },
            "collapsed": module.collapsed or _known_collapsed(module.run_folder),
            "rows": rows,
        }
        write_results(results, module.run_folder)
        print_table(results)
        self._log(trainer, module, rows, bits_per_input)

    def _log(
        self,
        trainer: Trainer,
        module: ElasticCalibration,
        rows: list[dict[str, Any]],
        bits_per_input: dict[float, list[float]],
    ) -> None:
        assert module.comparison is not None
        names = module.comparison.names
        for logger in trainer.loggers:
            for number, row in enumerate(r for r in rows if r["allocation"] == "router"):
                used = {f"used_bits/{n}": b for n, b in zip(names, bits_per_input[row["target_bits"]], strict=True)}
                metrics = {"eval/bits": row["used_bits"], "eval/ppl": row["perplexity"], "eval/kl": row["kl"], **used}
                logger.log_metrics(metrics, step=module.global_step + number + 1)
            if isinstance(logger, WandbLogger):
                logger.log_comparison(rows, module.run_folder / "results.png")


def _known_collapsed(folder: Path) -> dict[str, float]:
    """What the fit noted of collapsed routers; a later `validate` must not lose it."""
    path = folder / RESULTS
    return dict(json.loads(path.read_text(encoding="utf-8"))["collapsed"]) if path.is_file() else {}


def environment() -> dict[str, str]:
    """Versions and machine that a result was measured with."""
    packages = ("torch", "lightning", "transformers")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "mobiq_lightning": __version__,
        **{name: version(name) for name in packages},
        "python": sys.version.split()[0],
        "platform": platform.platform(terse=True),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
