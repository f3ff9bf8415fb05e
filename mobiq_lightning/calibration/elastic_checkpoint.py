"""The elastic checkpoint of a calibrated model: what is said of it in config.json, and who writes it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mobiq_lightning.checkpoint import CheckpointWriter, ElasticFormat, describe_provenance
from mobiq_lightning.runs import ELASTIC, PROVENANCE, RECIPE, without_place
from mobiq_lightning.strategies.class_paths import describe_factory

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration


def checkpoint_writer(module: ElasticCalibration) -> CheckpointWriter:
    """Writes the elastic checkpoint of a model that is being calibrated into its run folder."""
    return CheckpointWriter(module.sliced.source, module.layout, module.run_folder / ELASTIC)


def finish_checkpoint(module: ElasticCalibration, recipe: str) -> list[int]:
    """Completes the elastic checkpoint of a calibrated model in its run folder.

    Args:
        module: The model at the end of its fit.
        recipe: The YAML that made it.

    Returns:
        Blocks, by index from 0, whose shard was damaged since it was written, and was written again.
    """
    text = module.text.protocol.calibration.to_json()
    calibration = {**text, "data": without_place(text["data"]), "data_hash": module.text.calibration_digest}
    origin = describe_provenance(module.sliced.source, calibration, module.transform)
    extra = {RECIPE: recipe, PROVENANCE: json.dumps(origin, indent=2) + "\n"}
    return checkpoint_writer(module).finish(module.sliced.calibrated_blocks(), elastic_format(module), extra)


def elastic_format(module: ElasticCalibration) -> ElasticFormat:
    """What config.json says of the checkpoint of a calibrated model."""
    first = module.sliced.block_at(0)
    scheme: Any = next(iter(first.schemes.values()))
    stored = next((list(transform.stored()) for transform in first.transforms()), [])
    return ElasticFormat(
        slice_bits=list(scheme.slice_bits),
        group_size=scheme.group_size,
        router=describe_factory(module.router),
        transform={**module.transform.describe(), "stored": stored},
        layout=module.layout.to_stored(module.sliced.source.model),
        share_routers=module.share_routers,
        threshold_scope=module.threshold_scope,
        default_bits=float(module.budget.final_bits),
        budget_step=first.routed_inputs()[0].budget_step,
        code=scheme.code,
    )
