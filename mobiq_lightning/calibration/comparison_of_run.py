"""The comparison of a finished run: what it compares, and with what, follows from the run's recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mobiq_lightning.calibration.many_readings import ManyReadings
from mobiq_lightning.calibration.planning import comparison_memory, kept_in_comparison
from mobiq_lightning.calibration.ranks import everywhere
from mobiq_lightning.checkpoint import load
from mobiq_lightning.console import say
from mobiq_lightning.environment import free_on_device, give_back_memory
from mobiq_lightning.evaluation import RTN_BITS, Comparison, read_gains
from mobiq_lightning.nn import ElasticLinear
from mobiq_lightning.runs import LAYER_GAINS
from mobiq_lightning.strategies.class_paths import describe_factory

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration


def comparison_of_run(module: ElasticCalibration, folder: Path, device: torch.device) -> Comparison:
    """Loads the checkpoint of a run beside its source model; where both are larger than the device, they come block by block.

    Args:
        module: Holds the loaded source model and what the recipe says.
        folder: The run folder.
        device: Where to run.
    """
    trusted = describe_factory(module.router)["class_path"]  # the recipe names it, and has run it
    by_block = goes_by_block(module, device)
    model, on = module.sliced.source.model, None if by_block else device
    elastic = load(folder, dtype=model.dtype, device=on, trust_router=trusted)
    if device.type == "cpu":
        elastic.keep_weights(kept_in_comparison(module.sizes))
    seed = os.environ.get("PL_GLOBAL_SEED")
    linear = next(m for m in elastic.modules() if isinstance(m, ElasticLinear))
    key = rounding_key(module, linear.group_size, device)
    comparison = Comparison(
        model,
        elastic,
        module.layout,
        module.eval_bits,
        module.random_seeds,
        module.threshold_scope,
        device,
        None if seed is None else int(seed),
        module.shared_work.rows(key),
        by_block=ManyReadings if by_block else None,
    )
    comparison.rounded_key = key
    comparison.gains = read_gains(folder / LAYER_GAINS, comparison.names, comparison.slice_bits)
    return comparison


def goes_by_block(module: ElasticCalibration, device: torch.device) -> bool:
    """Whether the models of a comparison are too large for the device of some process, which is said."""
    free = free_on_device(device)
    needed = comparison_memory(module.sizes, module, module.text, device.type, free)
    said = needed.by_block(module.sizes, str(device), free) if needed.whole and free is not None else None
    found = [one for one in everywhere(said) if one is not None]
    if found:
        say(found[0])
    return bool(found)


def drop_learned(module: ElasticCalibration) -> None:
    """Lets go of what was learned, with its averages, once all of it is in the checkpoint: the comparison reads that."""
    for optimizer in module.trainer.optimizers:
        optimizer.state.clear()
    for block in module.sliced.calibrated_blocks():
        for tensor in (*block.schemes.parameters(), *block.schemes.buffers()):
            tensor.data = tensor.new_empty(0)
    give_back_memory()


def rounding_key(module: ElasticCalibration, group_size: int, device: torch.device) -> dict[str, Any]:
    """All that the rows of round-to-nearest depend on."""
    layout = module.layout.to_stored(module.sliced.source.model)
    return {
        "weights": module.sliced.source.fingerprint,
        "dtype": str(module.sliced.source.model.dtype),
        "group_size": group_size,
        "protocol": module.text.protocol.data_hash,
        "batch": module.text.eval_batch_size,
        "bits": RTN_BITS,
        "device": device.type,
        **{key: value for key, value in layout.items() if key == "experts"},
    }
