"""Measures after the comparison which tokens suffer most at each precision, and whether they are the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.callbacks.place import place_of_results
from mobiq_lightning.environment import environment
from mobiq_lightning.errors import RecipeError
from mobiq_lightning.outliers import (
    InputErrors,
    TokenRecord,
    check_precisions,
    check_share,
    overlap_metrics,
    print_overlaps,
    read_uniformly,
    spread_windows,
    summarize_tokens,
    write_outliers,
)


class OutlierMigration(CalibrationCallback):
    """After the comparison, reads the checkpoint with all tokens at one depth, for several depths, and compares the worst
    tokens: by the KL divergence of the model, and by the relative error of the linears of each input.

    Results go to outliers.json, outliers.csv and outliers.png beside results.json, to the terminal and to the loggers. What a
    calibration for one precision costs at another needs further calibrations: ``python -m mobiq_lightning outliers``.

    Args:
        bits: Precisions; by default all depths of the slices.
        share: Part of the tokens that counts as worst, in (0, 1).
        max_windows: Evaluation windows to read at most, spread over all of them; null reads all.
    """

    order = 10  # adds to what `Results` has written, and logs after it

    def __init__(self, bits: list[int] | None = None, share: float = 0.1, max_windows: int | None = 64) -> None:
        check_share(share)
        if max_windows is not None and max_windows < 1:
            raise RecipeError(f"OutlierMigration: max_windows ({max_windows}) must be at least 1, or null for all")
        self.bits: tuple[int, ...] = tuple(sorted(bits or ()))
        self.share, self.max_windows = share, max_windows

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks at the precisions before anything is loaded."""
        super().setup(trainer, pl_module, stage)
        assert isinstance(pl_module, ElasticCalibration)
        self.bits = chosen_bits(pl_module, self.bits)

    def on_validation_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Measures on the first rank."""
        if not trainer.is_global_zero:
            return
        record = self._read(module)
        tokens = summarize_tokens(record, self.share)
        found: dict[str, Any] = {
            "model": module.pretrained,
            "protocol": {**module.text.protocol.to_json(), "outlier_windows": int(record.windows[-1]) + 1},
            "environment": environment(),
            "bits": list(self.bits),
            "share": self.share,
            "tokens": {"elastic": tokens},
        }
        write_outliers(found, record, module.sliced.source.tokenizer, place_of_results(module))
        print_overlaps(found["tokens"])
        for logger in trainer.loggers:  # at the step of the last budget: W&B takes no earlier one
            logger.log_metrics(overlap_metrics(tokens), step=module.global_step + len(module.eval_bits))

    def _read(self, module: ElasticCalibration) -> TokenRecord:
        comparison, text = module.comparison, module.text
        assert comparison is not None
        assert text.evaluation is not None
        return read_uniformly(
            comparison.full,
            comparison.rounded,
            comparison.elastic,
            comparison.inputs,
            spread_windows(text.evaluation, text.eval_batch_size, self.max_windows),
            self.bits,
            InputErrors(comparison.full, comparison.elastic, self.bits),
        )


def chosen_bits(module: ElasticCalibration, bits: Sequence[int]) -> tuple[int, ...]:
    """The precisions asked for, or all depths of the recipe's slices.

    Raises:
        RecipeError: If one is no depth, or there are fewer than two.
    """
    depths = module.slices(8, 16).depths
    chosen = tuple(bits) or depths
    check_precisions(chosen, depths)
    return chosen
