"""Where what a comparison finds belongs: with the results of the run, or beside them if it is of another text."""

from __future__ import annotations

from pathlib import Path

from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.checkpoint import content_hash
from mobiq_lightning.runs import ELASTIC, Basis, place_of


def basis_of(module: ElasticCalibration) -> Basis:
    """What the comparison of a module is measured on; it has begun."""
    comparison = module.comparison
    assert comparison is not None
    return Basis(
        protocol=module.text.protocol,
        threshold_scope=module.threshold_scope,
        dtype=str(module.sliced.source.model.dtype).removeprefix("torch."),
        full_bits=comparison.full_bits,
        checkpoint=content_hash(module.run_folder / ELASTIC),
    )


def place_of_results(module: ElasticCalibration) -> Path:
    """The folder that figures of the comparison of a module are written to."""
    return place_of(module.run_folder, basis_of(module))
