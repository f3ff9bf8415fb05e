"""Writes what the comparison measured: terminal table, results.json, results.csv, results.png, loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import Trainer
from torch import Tensor

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.checkpoint import add_results
from mobiq_lightning.environment import environment
from mobiq_lightning.evaluation import print_table, write_results
from mobiq_lightning.loggers import WandbLogger
from mobiq_lightning.runs import (
    ELASTIC,
    LAYER_GAINS,
    RESULTS,
    RESULTS_PLOT,
    Measured,
    RouterNote,
    Row,
    SlicesNote,
    read_results,
)
from mobiq_lightning.runs import Results as StoredResults
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
            rounded = [row for row in rows if row.allocation == "rtn"]
            module.shared_work.keep_rows(module.comparison.rounded_key, rounded)
        # A later `validate` must not lose what guards noticed, the harness's tasks and speeds.
        known = read_results(module.run_folder / RESULTS)
        measured = self._measured(module, rows, known.measured)
        results = StoredResults(measured, known.lm_eval, known.latency)
        write_results(results, module.run_folder)
        add_results(module.run_folder / ELASTIC, results)
        print_table(measured)
        self._log(trainer, module, rows, bits_per_input)

    def _measured(self, module: ElasticCalibration, rows: Sequence[Row], known: Measured | None) -> Measured:
        """What the comparison has measured, with what an earlier one knows of the calibration."""
        comparison = module.comparison
        assert comparison is not None
        known_gains = known.layer_gains if known else ""
        return Measured(
            model=module.pretrained,
            protocol=module.text.protocol,
            environment=environment(),
            slices=SlicesNote(
                slice_bits=tuple(comparison.slice_bits),
                overhead_bits=comparison.overhead_bits,
                router_bits=comparison.router_bits,
                threshold_scope=module.threshold_scope,
            ),
            router=_describe_router(comparison.inputs[0].router),
            collapsed=module.record.collapsed or (known.collapsed if known else {}),
            layer_gains=module.record.layer_gains or known_gains or _describe_gains(comparison.gains),
            guards=tuple(module.record.guards) or (known.guards if known else ()),
            rows=tuple(rows),
        )

    def _log(
        self,
        trainer: Trainer,
        module: ElasticCalibration,
        rows: Sequence[Row],
        bits_per_input: Mapping[float, Sequence[float]],
    ) -> None:
        assert module.comparison is not None
        names = module.comparison.names
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.plot_against_bits()
            for number, row in enumerate(r for r in rows if r.allocation == "router"):
                used = {f"used_bits/{n}": b for n, b in zip(names, bits_per_input[row.target_bits], strict=True)}
                metrics = {"eval/bits": row.used_bits, "eval/ppl": row.perplexity, "eval/kl": row.kl, **used}
                for name in ("ppl", "kl"):  # one figure a run, for sweeps and for tables of runs
                    metrics[f"eval/{name}_at_{row.target_bits:g}_bits"] = metrics[f"eval/{name}"]
                logger.log_metrics(metrics, step=module.global_step + number + 1)
            if isinstance(logger, WandbLogger):
                logger.log_comparison([row.to_json() for row in rows], module.run_folder / RESULTS_PLOT)


def _describe_router(router: Router) -> RouterNote:
    """What results say of the routers, for tables."""
    return RouterNote(type(router).__name__, router.deployable)


def _describe_gains(gains: Tensor | None) -> str:
    """What results say of layer gains where neither the run nor its results do."""
    return (
        f"in {LAYER_GAINS}" if gains is not None else f"not measured: the run folder has no {LAYER_GAINS} of its inputs"
    )
