"""Writes what the comparison measured: terminal table, results.json, results.csv, results.png, loggers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.checkpoint import add_results
from mobiq_lightning.environment import environment
from mobiq_lightning.evaluation import print_table, write_results
from mobiq_lightning.loggers import WandbLogger
from mobiq_lightning.runs import ELASTIC, LAYER_GAINS, RESULTS
from mobiq_lightning.strategies.base import Router


class Results(CalibrationCallback):
    """Ends every validation: one table on the terminal, the same rows in the run folder, the checkpoint and the loggers."""

    def on_validation_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Gathers the rows on all ranks, writes them on the first."""
        assert module.comparison is not None
        rows = module.comparison.rows()
        bits_per_input = module.comparison.bits_per_input()
        if not trainer.is_global_zero:
            return
        if module.comparison.rounded_rows is None:
            rounded = [row for row in rows if row["allocation"] == "rtn"]
            module.shared_work.keep_rows(module.comparison.rounded_key, rounded)
        known = _known_results(module.run_folder)
        results: dict[str, Any] = {
            "model": module.pretrained,
            "protocol": module.text.protocol,
            "environment": environment(),
            "slices": {
                "slice_bits": list(module.comparison.slice_bits),
                "overhead_bits": module.comparison.overhead_bits,
                "router_bits": module.comparison.router_bits,
                "threshold_scope": module.threshold_scope,
            },
            "router": _describe_router(module.comparison.inputs[0].router),
            "collapsed": module.record.collapsed or known.get("collapsed", {}),
            "layer_gains": module.record.layer_gains
            or known.get("layer_gains")
            or _describe_gains(module.comparison.gains),
            "guards": module.record.guards or known.get("guards", []),
            "rows": rows,
        }
        results |= {key: known[key] for key in ("lm_eval", "latency") if key in known}
        write_results(results, module.run_folder)
        add_results(module.run_folder / ELASTIC, results)
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
            if isinstance(logger, WandbLogger):
                logger.plot_against_bits()
            for number, row in enumerate(r for r in rows if r["allocation"] == "router"):
                used = {f"used_bits/{n}": b for n, b in zip(names, bits_per_input[row["target_bits"]], strict=True)}
                metrics = {"eval/bits": row["used_bits"], "eval/ppl": row["perplexity"], "eval/kl": row["kl"], **used}
                for name in ("ppl", "kl"):  # one figure a run, for sweeps and for tables of runs
                    metrics[f"eval/{name}_at_{row['target_bits']:g}_bits"] = metrics[f"eval/{name}"]
                logger.log_metrics(metrics, step=module.global_step + number + 1)
            if isinstance(logger, WandbLogger):
                logger.log_comparison(rows, module.run_folder / "results.png")


def _describe_router(router: Router) -> dict[str, Any]:
    """What results say of the routers, for tables."""
    return {"class": type(router).__name__, "deployable": router.deployable}


def _describe_gains(gains: Tensor | None) -> str:
    """What results say of layer gains where neither the run nor its results do."""
    return (
        f"in {LAYER_GAINS}" if gains is not None else f"not measured: the run folder has no {LAYER_GAINS} of its inputs"
    )


def _known_results(folder: Path) -> dict[str, Any]:
    """What was found before: a later `validate` must not lose what guards noticed, the harness's tasks and speeds."""
    path = folder / RESULTS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
