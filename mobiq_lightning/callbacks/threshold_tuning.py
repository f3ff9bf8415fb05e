"""Finds, once all blocks are calibrated, the thresholds at which the model runs at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mobiq_lightning.calibration import ElasticCalibration, eval_mode, scores_of
from mobiq_lightning.calibration.guarding import COLLAPSE_SHARE, mixes_depths, most_common_share
from mobiq_lightning.callbacks.guards import guards_of
from mobiq_lightning.callbacks.layerwise_calibration import checked
from mobiq_lightning.nn import meet_budget
from mobiq_lightning.packing import depths_of
from mobiq_lightning.runtime import Dial
from mobiq_lightning.strategies.allocation import split_budget
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.thresholds import Scope, falling


class ThresholdTuning(Callback):
    """Fills the threshold tables of all inputs, for both scopes.

    The first round takes the quantiles of the scores that calibration windows get at the schedule's final budget. As the
    inputs of a layer depend on how deep the layers before it read, every further round runs the model at each budget with
    the thresholds found so far and takes the quantiles of those scores. Routers that score all tokens alike need one round.

    Args:
        windows: Calibration windows to score.
        rounds: Passes over the table; at least 1.
    """

    def __init__(self, windows: int = 16, rounds: int = 2) -> None:
        self.windows = windows
        self.rounds = rounds
        self._static: set[str] = set()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tunes after the last epoch of the last block, before its checkpoint is written."""
        module = checked(pl_module)
        if module.current_epoch + 1 == trainer.max_epochs:
            self.tune(module, trainer.datamodule.calibration_ids()[: self.windows])  # type: ignore[attr-defined]

    def tune(self, module: ElasticCalibration, input_ids: Tensor) -> None:
        """Fills the tables from windows (N, T)."""
        self._static = set()
        inputs = module.all_inputs()
        sizes, slice_bits = [routed.n_weights for routed in inputs], inputs[0].slice_bits
        kind = type(inputs[0].router)
        budgets = inputs[0].budgets.tolist()
        with eval_mode([routed.router for routed in inputs]):
            with meet_budget(inputs, module.budget.final_bits):
                scores = scores_of(module, input_ids)
            scopes: tuple[Scope, Scope] = ("layer", "global")
            tables = {s: _tables_for(kind, scores, sizes, slice_bits, budgets, s) for s in scopes}
            if self.rounds == 1 and kind.per_token:
                for column, bits in enumerate(budgets):
                    self._look_for_collapse(module, scores, tables["layer"][..., column], bits)
                tables["layer"] = _finish(module, tables["layer"])
            self._store(module, tables)
            for _ in range(self.rounds - 1 if kind.per_token else 0):
                tables = {scope: self._refine(module, input_ids, table, scope) for scope, table in tables.items()}
                self._store(module, tables)
        self._withdraw_repairs(module)
        for logger in module.trainer.loggers:
            logger.log_metrics(_threshold_metrics(module, tables["layer"][:, -1]), step=module.global_step)

    def _withdraw_repairs(self, module: ElasticCalibration) -> None:
        """Notes which inputs keep their router after all: one that seemed to collapse when its block was done may route."""
        for number, event in enumerate(module.guards):
            repaired = event.guard == "collapsed_router" and event.action == "repair"
            if repaired and event.input not in self._static:
                module.guards[number] = replace(event, action="record")

    def _refine(self, module: ElasticCalibration, input_ids: Tensor, table: Tensor, scope: Scope) -> Tensor:
        """The tables (inputs, S, budgets) from the scores that the model has when it runs at each budget."""
        inputs = module.all_inputs()
        sizes, slice_bits = [routed.n_weights for routed in inputs], inputs[0].slice_bits
        kind, refined, dial = type(inputs[0].router), table.clone(), Dial(inputs)
        for column, bits in enumerate(inputs[0].budgets.tolist()):
            dial.set_bits(bits, scope)
            scores = scores_of(module, input_ids)
            refined[..., column] = _tables_for(kind, scores, sizes, slice_bits, [bits], scope)[..., 0]
            if scope == "layer":
                self._look_for_collapse(module, scores, refined[..., column], bits)
        return _finish(module, refined)

    def _look_for_collapse(
        self, module: ElasticCalibration, scores: list[Tensor], thresholds: Tensor, bits: float
    ) -> None:
        """Lets the guards know of inputs whose tokens cannot be told apart; if they say so, these get a static depth.

        Args:
            module: The calibrated model.
            scores: Of each input, at this budget.
            thresholds: (inputs, S), mended in place.
            bits: The budget.
        """
        inputs, guards = module.all_inputs(), guards_of(module.trainer)
        slice_bits = inputs[0].slice_bits
        if not inputs[0].router.per_token or not mixes_depths(slice_bits, bits):
            return
        shares = [most_common_share(s, float(t[-1])) for s, t in zip(scores, thresholds, strict=True)]
        collapsed = [i for i, share in enumerate(shares) if share > COLLAPSE_SHARE]
        static = [i for i in collapsed if guards.note_collapse(module, i, shares[i], bits)]
        self._static |= {module.input_names()[i] for i in static}
        sizes = [inputs[i].n_weights for i in static]
        first = sum(depth < bits for depth in depths_of(slice_bits))  # models that hold less read all that they hold
        for i, n_open in zip(static, nested_allocation(sizes, slice_bits, bits), strict=True):
            thresholds[i, first:] = _threshold_for_depth(scores[i], n_open)

    def _store(self, module: ElasticCalibration, tables: dict[Scope, Tensor]) -> None:
        for row, routed in enumerate(module.all_inputs()):
            routed.set_tables(tables["layer"][row], tables["global"][row])


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
        tables.append(kind.thresholds_for([s[:, :k] for s in scores], sizes, slice_bits[: k + 1], asked, scope))
    return torch.stack(tables, dim=1)


def nested_allocation(sizes: Sequence[int], slice_bits: tuple[int, ...], target_bits: float) -> list[int]:
    """Static depths that only grow with the budget, as thresholds must: an input that has moved up stays there.

    `StaticRouter.allocate` comes nearer to a budget, but may take a slice away from an input when the budget rises.

    Args:
        sizes: Weights that each input feeds.
        slice_bits: Bits of each slice.
        target_bits: Average bits per weight over these inputs.

    Returns:
        Slices after the base that each input reads.
    """
    lower, share = split_budget(slice_bits, target_bits)
    n_open, given = [lower] * len(sizes), 0
    for i in sorted(range(len(sizes)), key=lambda i: i * 0.6180339887 % 1):  # golden ratio: spread over the model
        if given + sizes[i] / 2 > share * sum(sizes):
            break
        n_open[i] += 1
        given += sizes[i]
    return n_open


def _finish(module: ElasticCalibration, table: Tensor) -> Tensor:
    """Thresholds (inputs, S, budgets) of which those of a model that holds less stay open above that, and that fall."""
    budgets, slice_bits = module.all_inputs()[0].budgets, module.all_inputs()[0].slice_bits
    for k, highest in enumerate(depths_of(slice_bits)):  # above what is held, all stays open
        held = int((budgets <= highest).sum())
        table[:, k, held:] = table[:, k, held - 1 : held]
    return falling(table) if module.all_inputs()[0].router.per_token else table


def _threshold_for_depth(scores: Tensor, n_open: int) -> Tensor:
    """The threshold at which a typical token of (N, S - 1) scores opens `n_open` slices after the base."""
    median = scores.float().median(dim=0).values
    edges = torch.cat([median[:1] + 1.0, (median[:-1] + median[1:]) / 2, median[-1:] - 1.0])
    return edges[n_open]


def _threshold_metrics(module: ElasticCalibration, table: Tensor) -> dict[str, float]:
    """Thresholds at whole bits, for loggers."""
    inputs = module.all_inputs()
    whole = [(c, int(b)) for c, b in enumerate(inputs[0].budgets.tolist()) if b == int(b)]
    names = module.input_names()
    return {
        f"threshold/{bits}_bits/{name}": float(table[row, c]) for row, name in enumerate(names) for c, bits in whole
    }
