"""Writes what the comparison measured: terminal table, results.json, results.csv, results.png, loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from torch import Tensor

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.callbacks.place import basis_of
from mobiq_lightning.checkpoint import add_results
from mobiq_lightning.console import say
from mobiq_lightning.environment import environment
from mobiq_lightning.evaluation import print_table, write_results
from mobiq_lightning.loggers import WandbLogger
from mobiq_lightning.runs import (
    ELASTIC,
    LAYER_GAINS,
    RESULTS,
    RESULTS_PLOT,
    Basis,
    Measured,
    RouterNote,
    Row,
    SlicesNote,
    budgets_of,
    drop_stale,
    known_results,
    merged,
    place_of,
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
        measured, place = self._write(module, rows)
        print_table(measured)
        self._log(trainer, module, rows, bits_per_input, measured, place)

    def _write(self, module: ElasticCalibration, rows: Sequence[Row]) -> tuple[Measured, Path]:
        """Puts rows beside those that are known of the same text, and writes all that is made of them.

        Returns:
            What is known now, and the folder that it was written to.
        """
        run, basis = module.run_folder, basis_of(module)
        place, of_run = place_of(run, basis), known_results(run)
        known = of_run if place == run else read_results(place / RESULTS)
        new = self._measured(module, rows, of_run.measured, basis)
        if known.measured is not None and not Basis.of(known.measured).is_of_checkpoint(basis):
            held = (
                [f"{len(known.measured.rows)} rows", "times"] if known.latency else [f"{len(known.measured.rows)} rows"]
            )
            held += [f"{len(known.lm_eval)} scores of tasks"] if known.lm_eval else []
            said = f"what it held ({', '.join(held)}) is replaced"
            say(f"{place / RESULTS} was of another checkpoint than {run / ELASTIC} is now; {said}.")
            known = StoredResults()
        measured = merged(known.measured, new)
        # A later `validate` must not lose what guards noticed, the harness's tasks and speeds.
        results = StoredResults(measured, known.lm_eval, known.latency)
        write_results(results, place)
        if place == run:
            drop_stale(run, basis)
            add_results(run / ELASTIC, results)
        _say_what_stays(of_run.measured, new, measured, place if place != run else None)
        return measured, place

    def _measured(
        self, module: ElasticCalibration, rows: Sequence[Row], known: Measured | None, basis: Basis
    ) -> Measured:
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
                sliced_share=module.sizes.share,
            ),
            router=_describe_router(comparison.inputs[0].router),
            collapsed=module.record.collapsed or (known.collapsed if known else {}),
            layer_gains=module.record.layer_gains or known_gains or _describe_gains(comparison.gains),
            guards=tuple(module.record.guards) or (known.guards if known else ()),
            checkpoint=basis.checkpoint,
            dtype=basis.dtype,
            rows=tuple(rows),
        )

    def _log(
        self,
        trainer: Trainer,
        module: ElasticCalibration,
        rows: Sequence[Row],
        bits_per_input: Mapping[float, Sequence[float]],
        measured: Measured,
        place: Path,
    ) -> None:
        """A point for each budget that was measured now; the table of all that is known."""
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
                logger.log_comparison([row.to_json() for row in measured.rows], place / RESULTS_PLOT)


def _describe_router(router: Router) -> RouterNote:
    """What results say of the routers, for tables."""
    return RouterNote(type(router).__name__, router.deployable)


def _describe_gains(gains: Tensor | None) -> str:
    """What results say of layer gains where neither the run nor its results do."""
    return (
        f"in {LAYER_GAINS}" if gains is not None else f"not measured: the run folder has no {LAYER_GAINS} of its inputs"
    )


def _say_what_stays(of_run: Measured | None, new: Measured, measured: Measured, beside: Path | None) -> None:
    """Says where figures are that do not stand alone in the run's results, and what those hold beside them."""
    if beside is not None:
        assert of_run is not None
        differences = Basis.of(of_run).differences(Basis.of(new))
        say(
            f"This is not what {RESULTS} of the run was measured on: {', '.join(differences)}. It is in {beside}; the results "
            "of the run and of its checkpoint stay as they are."
        )
    now = budgets_of(new.rows)
    if stay := [bits for bits in budgets_of(measured.rows) if bits not in now]:
        say(f"Measured now: {_listed(now)} bits. As they were measured before: {_listed(stay)} bits.")


def _listed(budgets: Sequence[float]) -> str:
    return ", ".join(f"{bits:g}" for bits in budgets)
