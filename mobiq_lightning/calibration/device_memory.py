"""Brings the whole sliced model to the device, for stages that train it end to end and for measuring it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mobiq_lightning.calibration.planning import measuring_need, model_stage_need
from mobiq_lightning.environment import free_on_device
from mobiq_lightning.errors import ModelError

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration


def move_model(module: ElasticCalibration) -> None:
    """Moves the source model to the device of the module.

    Raises:
        ModelError: If it does not fit there with what training it takes.
    """
    device = module.device
    if (free := free_on_device(device)) is not None and (needed := needed_bytes(module)) > free:
        raise ModelError(too_large(module, needed, free))
    module.sliced.enter_device(device)


@contextmanager
def whole_model_on_device(module: ElasticCalibration, needed: int) -> Iterator[str | None]:
    """Within it, the source model is on the device of the module, and no block is thought to be there alone.

    Args:
        module: Holds the source model.
        needed: Bytes that whoever asks will need on the device, the model included.

    Yields:
        None; or, if they are not there, a clause that says so, with the figures, and the model stays where it is.
    """
    sliced, device = module.sliced, module.device
    sliced.caller.release()
    there = next(sliced.source.model.parameters()).device == device
    if not there and (free := free_on_device(device)) is not None and needed > free:
        yield f"the whole model would take about {needed / 1e9:.1f} GB on {device}, of which {free / 1e9:.1f} GB are free"
        return
    if not there:
        sliced.enter_device(device)
    try:
        yield None
    finally:
        if not there:
            sliced.leave_device()


def measuring_bytes(module: ElasticCalibration, seq_len: int, batch_size: int, gradients: bool) -> int:
    """About what measuring layer gains needs on the device: frozen weights, codes, the logits and activations of a batch of
    windows, all depths of one linear; for gradients those of one block with their squares, and the activations of a window.
    """
    return measuring_need(module.sizes, seq_len, batch_size, gradients)


def too_large(module: ElasticCalibration, needed: int, free: int) -> str:
    """What the user reads if the model does not fit."""
    number, trained = module.segment.number, module.stage.trained
    return (
        f"model.stages[{number}] (scope model, {trained}) needs about {needed / 1e9:.1f} GB on {module.device} for the whole "
        f"model; {free / 1e9:.1f} GB are free. Everything before is kept: take this stage out, train less in it (routers and "
        "ranges need far less than codes), set model.recompute_blocks, lower data.batch_size, or use a larger device"
    )


def needed_bytes(module: ElasticCalibration) -> int:
    """About what a model stage needs on the device: frozen weights, what is learned with AdamW's two averages and the
    gradient, codes, one dequantized copy of the weights in training, and activations.
    """
    return model_stage_need(module.sizes, module.stage, module, module.text)
