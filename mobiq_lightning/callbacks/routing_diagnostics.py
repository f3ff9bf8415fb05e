"""Writes what the routers of a finished run do, and how good its blocks are, into diagnostics.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.callbacks.place import basis_of
from mobiq_lightning.console import say
from mobiq_lightning.errors import RecipeError, ResultsError
from mobiq_lightning.evaluation import BlockErrors, Comparison, residual_basis, use_by_frequency, use_by_position
from mobiq_lightning.files import write_json
from mobiq_lightning.nn import full_precision
from mobiq_lightning.runs import (
    DIAGNOSTICS,
    Basis,
    BlockErrorNote,
    BudgetUse,
    Diagnostics,
    InputSize,
    known_results,
    merged_diagnostics,
    place_of,
    read_diagnostics,
)
from mobiq_lightning.sources import IGNORED, ComparisonPass


class RoutingDiagnostics(CalibrationCallback):
    """With every comparison: depths per input at each budget, bits by token position and frequency, error of each block.

    What routers do is counted while the comparison runs. The blocks' errors take passes of their own, through a few
    evaluation batches spread over all of them: windows come sorted by length.

    Args:
        error_batches: Evaluation batches on which the blocks' errors are measured, per process.
    """

    def __init__(self, error_batches: int = 2) -> None:
        if error_batches < 1:
            raise RecipeError(f"RoutingDiagnostics: error_batches ({error_batches}) must be at least 1")
        self.error_batches = error_batches
        self.errors: BlockErrors | None = None

    def on_validation_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Every validation measures anew."""
        self.errors = None

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: ElasticCalibration,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measures the blocks' errors on some batches of the first pass."""
        number = ComparisonPass(dataloader_idx)
        count = int(trainer.num_val_batches[number])
        if number is not ComparisonPass.ROUTER or batch_idx not in _spread(self.error_batches, count):
            return
        comparison = _comparison(module)
        if self.errors is None:
            full, elastic = module.layout.find(comparison.full), module.layout.find(comparison.elastic)
            basis = residual_basis(comparison.full, comparison.elastic)
            errors = BlockErrors(list(full), list(elastic), comparison.inputs[0].depths, basis)
            self.errors = errors.to(comparison.device)
        ids, labels = batch["input_ids"].to(comparison.device), batch["labels"].to(comparison.device)
        with full_precision(comparison.rounded):
            self.errors.update(comparison.full, ids, labels != IGNORED)

    def on_validation_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Gathers on all ranks, writes on the first."""
        comparison = _comparison(module)
        assert self.errors is not None
        errors, tokens = self.errors.compute()
        found = Diagnostics(
            inputs=tuple(InputSize(n, w) for n, w in zip(comparison.names, comparison.sizes, strict=True)),
            depths=tuple(comparison.inputs[0].depths),
            budgets=tuple(_budget(*use, comparison.inputs[0].depths) for use in comparison.routing_uses()),
            block_error=BlockErrorNote(int(tokens), tuple(map(tuple, errors.tolist()))),
        )
        if trainer.is_global_zero:
            _write(module, found)


def _write(module: ElasticCalibration, found: Diagnostics) -> None:
    """Writes diagnostics, with what is known of other budgets of the same checkpoint and text."""
    basis = basis_of(module)
    path = place_of(module.run_folder, basis) / DIAGNOSTICS
    measured = known_results(path.parent).measured
    if path.is_file() and measured is not None and Basis.of(measured).is_of_checkpoint(basis):
        try:
            known = merged_diagnostics(read_diagnostics(path), found)
        except ResultsError as error:
            known = None
            say(f"{error}. It is written anew, with the budgets of this comparison alone.")
        found = known or found
    write_json(path, found.to_json())


def _budget(target_bits: float, sums: dict[str, Tensor], depths: Sequence[int]) -> BudgetUse:
    """What the routers did at one budget."""
    share = sums["read"].double() / sums["read"].sum(1, keepdim=True)
    return BudgetUse(
        target_bits=target_bits,
        mean_bits=tuple((share @ share.new_tensor(depths)).tolist()),
        depth_share=tuple(map(tuple, share.tolist())),
        by_position=tuple(use_by_position(sums)),
        by_frequency=tuple(use_by_frequency(sums)),
    )


def _spread(chosen: int, count: int) -> set[int]:
    """So many of the numbers below `count`, evenly spread."""
    return {(2 * number + 1) * count // (2 * chosen) for number in range(chosen)}


def _comparison(module: ElasticCalibration) -> Comparison:
    assert module.comparison is not None, "validation starts the comparison"
    return module.comparison
