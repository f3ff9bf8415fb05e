"""Finds, once all blocks are calibrated, the thresholds at which the model runs at each budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from mobiq_lightning.calibration import (
    ElasticCalibration,
    eval_mode,
    gather_windows,
    scores_of,
    share_of_windows,
    unchanged_weights,
)
from mobiq_lightning.calibration.guarding import StaticDepths
from mobiq_lightning.calibration.planning import FORWARD, ModelSizes, Phase, StepTimes, threshold_windows
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.callbacks.guards import guards_of
from mobiq_lightning.console import say
from mobiq_lightning.nn import meet_budget, run_budgets
from mobiq_lightning.packing import STORED_DTYPE, depths_of
from mobiq_lightning.runtime import Dial
from mobiq_lightning.sources import TextWindows
from mobiq_lightning.strategies import ThresholdTask
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.thresholds import Scope, falling

PHASE = "thresholds"
WINDOWS = 16
"""Calibration windows to score, where the recipe does not say."""


class ThresholdTuning(CalibrationCallback):
    """Fills the threshold tables of all inputs, for both scopes.

    The first round takes the quantiles of the scores that calibration windows get at the schedule's final budget. As the
    inputs of a layer depend on how deep the layers before it read, every further round runs the model at every depth and three
    budgets between two of them, with the thresholds found so far, and takes the quantiles of those scores, for the budgets
    around it. Routers that score all tokens alike need one round.

    Args:
        windows: Calibration windows to score, the first ones. By default 16; fewer where these would take more than a tenth of
            the calibration, as products and sums are counted, but 4 windows and 2048 tokens at least.
        rounds: Passes over the table; at least 1.
    """

    def __init__(self, windows: int | None = None, rounds: int = 2) -> None:
        self.windows = windows
        self.rounds = rounds
        self._done = 0

    def phases(self, module: ElasticCalibration, sizes: ModelSizes, text: TextWindows, times: StepTimes) -> list[Phase]:
        """Passes of the windows through all blocks: one, and in each further round one for every budget and scope."""
        windows = self._windows(module, sizes, text)
        return [Phase(PHASE, FORWARD, self._passes(sizes), sizes.n_blocks * windows / text.batch_size * times.read)]

    def _passes(self, sizes: ModelSizes) -> int:
        return 1 + (self.rounds - 1) * 2 * len(run_budgets(sizes.slice_bits))

    def _windows(self, module: ElasticCalibration, sizes: ModelSizes, text: TextWindows) -> int:
        if self.windows is not None:
            return min(self.windows, text.n_windows)
        return threshold_windows(module, sizes, text, WINDOWS, self._passes(sizes))

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Tunes after the last epoch of the last block, before its checkpoint is written."""
        if module.current_epoch + 1 == trainer.max_epochs:
            windows = self._windows(module, module.sizes, module.text)
            if self.windows is None and windows < min(WINDOWS, module.text.n_windows):
                say(f"Thresholds are tuned on {windows} windows: {WINDOWS} would take over a tenth of the calibration.")
            self.tune(module, module.text.calibration_ids()[:windows])

    def tune(self, module: ElasticCalibration, input_ids: Tensor) -> None:
        """Fills the tables from windows (N, T), once the routers have the precision that they are stored in."""
        inputs, guards = module.sliced.all_inputs(), guards_of(module.trainer)
        for routed in inputs:
            round_parameters(routed.router)
        static = StaticDepths(module.sliced, lambda seen: guards is not None and guards.note_collapse(module, seen))
        sizes, slice_bits = [routed.n_weights for routed in inputs], inputs[0].slice_bits
        kind = type(inputs[0].router)
        budgets = inputs[0].budgets.tolist()
        self._done = 0
        module.clock.restart()
        blocks = module.sliced.calibrated_blocks()
        with eval_mode([routed.router for routed in inputs]), unchanged_weights(module, blocks, 4):
            with meet_budget(inputs, module.budget.final_bits):
                scores = self._scores(module, input_ids)
            scopes: tuple[Scope, Scope] = ("layer", "global")
            tables = {s: _tables_for(kind, scores, sizes, slice_bits, budgets, s) for s in scopes}
            if self.rounds == 1 and kind.per_token:
                whole = [scores] * len(inputs[0].run_columns)
                tables["layer"] = _finish(module, _between(module, whole, "layer", static))
            self._store(module, tables)
            for _ in range(self.rounds - 1 if kind.per_token else 0):
                tables = {s: self._refine(module, input_ids, table, s, static) for s, table in tables.items()}
                self._store(module, tables)
        module.clock.end(PHASE)
        module.record.keep_routers(
            static.names
        )  # one that seemed to collapse when its block was done may route after all
        for logger in module.trainer.loggers:
            logger.log_metrics(_threshold_metrics(module, tables["layer"][:, -1]), step=module.global_step)

    def _refine(
        self, module: ElasticCalibration, input_ids: Tensor, table: Tensor, scope: Scope, static: StaticDepths
    ) -> Tensor:
        """The tables (inputs, S, budgets) from the scores that the model has when it runs at the `run_columns` of an input."""
        inputs = module.sliced.all_inputs()
        dial, budgets = Dial(inputs), inputs[0].budgets.tolist()

        def run() -> Iterator[list[Tensor]]:  # one after the other: they take much memory
            own = share_of_windows(module, input_ids)
            for column in inputs[0].run_columns:
                dial.set_bits(budgets[column], scope)
                found = [scores.unflatten(0, own.shape) for scores in self._scores(module, own)]
                yield [scores.flatten(0, 1) for scores in gather_windows(module, found, len(input_ids), 0)]

        return _finish(module, _between(module, run(), scope, static))

    def _scores(self, module: ElasticCalibration, input_ids: Tensor) -> list[Tensor]:
        """The scores of a pass of the windows, which the clock of the run counts."""
        scores, self._done = scores_of(module.sliced, input_ids), self._done + 1
        module.clock.step(PHASE, self._done, max(self._done, module.clock.left.steps(PHASE)))
        return scores

    def _store(self, module: ElasticCalibration, tables: dict[Scope, Tensor]) -> None:
        for row, routed in enumerate(module.sliced.all_inputs()):
            routed.set_tables(tables["layer"][row], tables["global"][row])


@torch.no_grad()
def round_parameters(router: Router) -> None:
    """Rounds what a router has learned to bfloat16, so that it takes half the bits: a checkpoint stores it in that."""
    for parameter in router.parameters():
        parameter.copy_(parameter.to(STORED_DTYPE))


def _between(
    module: ElasticCalibration, found: Iterable[Sequence[Tensor]], scope: Scope, static: StaticDepths
) -> Tensor:
    """The tables (inputs, S, budgets) from the scores of runs at some budgets.

    At a budget between two runs a threshold is that of either, by how near it is.

    Args:
        module: The calibration.
        found: For each of the `run_columns` of an input, the scores (N, S - 1) of each input.
        scope: Which tables.
        static: Gives static depths to inputs whose routers have collapsed, where each input meets the budget by itself.
    """
    inputs = module.sliced.all_inputs()
    sizes, slice_bits, budgets = [r.n_weights for r in inputs], inputs[0].slice_bits, inputs[0].budgets.tolist()
    runs, kind = inputs[0].run_columns, type(inputs[0].router)
    table = torch.zeros(len(inputs), len(slice_bits), len(budgets))
    for number, (run, scores) in enumerate(zip(runs, found, strict=True)):
        before, after = runs[max(0, number - 1)], runs[min(number + 1, len(runs) - 1)]
        columns = range(before + (before < run), after + (after == run))
        own = _tables_for(kind, scores, sizes, slice_bits, [budgets[column] for column in columns], scope).cpu()
        collapsed = static.collapsed(own[..., run - columns.start], scores, budgets[run]) if scope == "layer" else []
        for place, column in enumerate(columns):
            distance = (run - before) if column < run else (after - run)
            weight = 1.0 if column == run else 1 - abs(column - run) / distance
            mended = static.mended(own[..., place], scores, budgets[column], collapsed)
            table[..., column] += weight * mended.cpu()
    return table


def _tables_for(
    kind: type[Router],
    scores: Sequence[Tensor],
    sizes: Sequence[int],
    slice_bits: tuple[int, ...],
    budgets: Sequence[float],
    scope: Scope,
) -> Tensor:
    """Thresholds (inputs, S, budgets); entry k of the middle is for a model that holds the first k + 1 slices alone.

    Capping the depth of a model that was tuned without a cap would spend less than asked: some tokens read beyond it.
    Budgets above what such a model holds are those of all that it holds.
    """
    tables = []
    for k, highest in enumerate(depths_of(slice_bits)):
        asked = [min(bits, highest) for bits in budgets]
        tables.append(
            kind.thresholds_for(ThresholdTask([s[:, :k] for s in scores], sizes, slice_bits[: k + 1], asked, scope))
        )
    return torch.stack(tables, dim=1)


def _finish(module: ElasticCalibration, table: Tensor) -> Tensor:
    """Thresholds (inputs, S, budgets) of which those of a model that holds less stay open above that, and that fall."""
    budgets, slice_bits = module.sliced.all_inputs()[0].budgets, module.sliced.all_inputs()[0].slice_bits
    for k, highest in enumerate(depths_of(slice_bits)):  # above what is held, all stays open
        held = int((budgets <= highest).sum())
        table[:, k, held:] = table[:, k, held - 1 : held]
    return falling(table) if module.sliced.all_inputs()[0].router.per_token else table


def _threshold_metrics(module: ElasticCalibration, table: Tensor) -> dict[str, float]:
    """Thresholds at whole bits, for loggers."""
    inputs = module.sliced.all_inputs()
    whole = [(c, int(b)) for c, b in enumerate(inputs[0].budgets.tolist()) if b == int(b)]
    names = module.sliced.input_names()
    return {
        f"threshold/{bits}_bits/{name}": float(table[row, c]) for row, name in enumerate(names) for c, bits in whole
    }
