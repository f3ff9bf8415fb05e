"""Writes the elastic checkpoint: each block's shard when the block is done, the rest when all are."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Trainer

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.checkpoint import CheckpointWriter, describe_factory, describe_provenance
from mobiq_lightning.packing import CODES, FORMAT_VERSION, QUANT_METHOD, PackedSlices
from mobiq_lightning.runs import ELASTIC, PROVENANCE, RECIPE


class BlockExport(CalibrationCallback):
    """Writes blocks as they finish: nothing finished is lost, and saving needs no more memory than one block.

    A resumed run that calibrates a block again, bit for bit, writes its shard again.
    """

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Writes the blocks whose last epoch this was."""
        if trainer.is_global_zero:
            for block in range(len(module.blocks)):
                if module.schedule.final_epoch(block) == module.current_epoch:
                    _writer(module).write_block(block)


def finish_checkpoint(module: ElasticCalibration, recipe: str) -> list[int]:
    """Completes the elastic checkpoint of a calibrated model in its run folder.

    Args:
        module: At the end of its fit.
        recipe: The YAML that made it.

    Returns:
        Blocks whose shard was damaged since it was written, and was written again.
    """
    blocks = module.sliced.calibrated_blocks()
    scheme: Any = next(iter(blocks[0].schemes.values()))
    stored = next((list(transform.stored()) for transform in blocks[0].transforms()), [])
    quantization = {
        "quant_method": QUANT_METHOD,
        # Older packages know neither other codes than the nested one nor transforms of inputs.
        "format_version": max(CODES[scheme.code].format_version, FORMAT_VERSION if stored else 1),
        "slice_bits": list(scheme.slice_bits),
        "group_size": scheme.group_size,
        "router": describe_factory(module.router),
        "transform": {**module.transform.describe(), "stored": stored},
        "layout": asdict(module.layout),
        "share_routers": module.share_routers,
        "threshold_scope": module.threshold_scope,
        "default_bits": float(module.budget.final_bits),
        "max_bits": None,
    }
    if scheme.code != PackedSlices.code:
        quantization["code"] = scheme.code
    calibration = {**module.text.protocol["calibration"], "data_hash": module.text.calibration_digest}
    origin = describe_provenance(module.sliced.source, calibration, module.transform)
    extra = {RECIPE: recipe, PROVENANCE: json.dumps(origin, indent=2) + "\n"}
    return _writer(module).finish(blocks, quantization, extra)


def _writer(module: ElasticCalibration) -> CheckpointWriter:
    return CheckpointWriter(module.sliced.source, module.layout, module.run_folder / ELASTIC)
