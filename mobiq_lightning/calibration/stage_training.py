"""What a stage does to the blocks that it trains: beginning and ending their codes, keeping gradients and bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mobiq_lightning.calibration.block_batch import BlockBatch
from mobiq_lightning.calibration.model_batch import ModelBatch
from mobiq_lightning.calibration.rates import KINDS
from mobiq_lightning.calibration.schedule import Stage
from mobiq_lightning.environment import free_on_device
from mobiq_lightning.nn import CalibratedBlock, SlicedLinear, keeping_weights, kept_limit
from mobiq_lightning.strategies import TrainableCodes
from mobiq_lightning.strategies.base import BlockRun, Objective

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration


@torch.no_grad()
def begin_stage(module: ElasticCalibration) -> None:
    """Begins the slice of the current stage, unless it is in training already, as after a resume or in a stage before."""
    stage = module.stage
    if not stage.trains("codes") or stage.depth is None:
        return
    for scheme, weight in _codes_in_training(module):
        if scheme.start_slice(weight, stage.depth):
            _forget_averages(module, scheme)  # they were another slice's


@torch.no_grad()
def end_stage(module: ElasticCalibration) -> None:
    """In the last epoch of a stage, fixes the codes if no later stage moves them, and drops what their training needed."""
    if module.current_epoch != module.segment.epochs.stop - 1 or not module.stage.trains("codes"):
        return
    if not module.schedule.trains_codes_after(module.segment):
        for scheme, weight in _codes_in_training(module):
            scheme.freeze(weight)
            _forget_averages(module, scheme)


def objective_on(module: ElasticCalibration, batch: dict[str, Tensor]) -> tuple[Objective, BlockRun]:
    """What the current stage trains to match, and what it sees of a batch of calibration windows.

    Args:
        module: The calibration.
        batch: ``input_ids`` (B, T) and ``index`` (B,), the numbers of the windows.
    """
    sliced, block, depths = module.sliced, module.block_index, module.stage.depths
    if block is None:
        ids = batch["input_ids"].to(module.device)
        model, decoder, inputs = sliced.source.model, list(sliced.decoder), sliced.all_inputs()
        mixed = mixture(module.stage, inputs[0].depths, len(inputs), module.global_step)
        run = ModelBatch(model, decoder, inputs, ids, depths, module.recompute_blocks)
        if module.stage.depth is not None and mixed is not None:
            run.mix(module.stage.depth, mixed)
        return module.model_objective, run
    assert module.hidden is not None
    calibrated = sliced.block_at(block)
    return module.objective, BlockBatch(calibrated, block, sliced.caller, module.hidden, batch["index"], depths)


def mixture(stage: Stage, depths: Sequence[int], n_inputs: int, step: int) -> list[int] | None:
    """What each input reads in a step that mixes the depth of a stage with the one before it.

    Args:
        stage: The stage.
        depths: Depths of the slices, in bits.
        n_inputs: Routed inputs of the model.
        step: Number of the step, which decides what is drawn, so that a resumed run draws what the interrupted one did.

    Returns:
        Slices that each input reads: those of the depth, at least for one input, or one less. None in a step that does not mix.
    """
    generator = torch.Generator().manual_seed(step)
    drawn, part = torch.rand(2, generator=generator).tolist()
    if stage.depth is None or drawn >= stage.mixed:
        return None
    place = torch.rand(n_inputs, generator=generator)
    deep = place < part
    deep[place.argmin()] = True  # or nothing that is trained would be read
    reached = list(depths).index(stage.depth) + 1
    return [reached if reads else reached - 1 for reads in deep.tolist()]


@contextmanager
def unchanged_weights(
    module: ElasticCalibration, blocks: Sequence[CalibratedBlock], itemsize: int | None = None
) -> Iterator[None]:
    """Context in which nothing changes ranges, codes and transforms of some blocks, so that weights are made once, if they fit.

    On a GPU they take a quarter of what is free at most.

    Args:
        module: The calibration.
        blocks: The blocks.
        itemsize: Bytes of a number of the weights that are asked for, 4 where tokens are routed without gradients; by default
            those of the model.
    """
    linears = [linear for block in blocks for linear in block.sliced_linears()]
    itemsize = module.sliced.source.model.dtype.itemsize if itemsize is None else itemsize
    limit = kept_limit(sum(linear.weight.numel() * len(linear.routed.depths) * itemsize for linear in linears))
    if (free := free_on_device(module.device)) is not None:
        limit = min(limit, free // 4)
    with keeping_weights(linears, limit):
        yield


def require_gradients(module: ElasticCalibration) -> None:
    """Has gradients computed for what the current stage trains alone: those of all else would be dropped.

    A stage that trains nothing, such as one of routers that have nothing to learn, keeps them, and so do blocks that fell back
    to codes without training: the loss needs some.
    """
    blocks, stage = module.blocks_in_training(), module.stage
    given_up = [module.sliced.block_at(index) for index in module.record.given_up]
    idle = not any(block.parameters_of(kind) for block in blocks for kind in KINDS if stage.trains(kind))
    for block in blocks:
        for kind in KINDS:
            for parameter in block.parameters_of(kind):
                parameter.requires_grad_(idle or block in given_up or stage.trains(kind))


def keep_gradients(module: ElasticCalibration) -> None:
    """Drops the gradients of what the current stage does not train, and averages those that DDP does not.

    Blocks that fell back to codes without training train nothing but their routers any more.
    """
    given_up = [module.sliced.block_at(index) for index in module.record.given_up]
    for block in module.blocks_in_training():
        for kind in KINDS:
            idle = not module.stage.trains(kind) or (block in given_up and kind != "routers")
            for parameter in block.parameters_of(kind):
                if idle:
                    parameter.grad = None
                elif kind == "codes" and module.trainer.world_size > 1 and parameter.grad is not None:
                    parameter.grad = module.trainer.strategy.reduce(parameter.grad, reduce_op="mean")


@torch.no_grad()
def keep_bounds(module: ElasticCalibration) -> None:
    """Moves what the current stage trains back within its bounds."""
    if "clipping" in module.stage.bounds:
        for linear in _linears_in_training(module):
            linear.scheme.bound_clipping()
    rounding = "rounding" in module.stage.bounds
    bounded = any(scheme.max_saturation is not None for scheme in _schemes_in_training(module))
    if module.stage.trains("codes") and (rounding or bounded):  # weights are made for it, if there is a transform
        for scheme, weight in _codes_in_training(module):
            if rounding:
                scheme.bound_rounding(weight)
            if scheme.max_saturation is not None:
                scheme.bound_saturation(weight)


def _linears_in_training(module: ElasticCalibration) -> Iterator[SlicedLinear]:
    for block in module.blocks_in_training():
        yield from block.sliced_linears()


def _schemes_in_training(module: ElasticCalibration) -> Iterator[TrainableCodes]:
    """The schemes in training whose codes can be trained."""
    for linear in _linears_in_training(module):
        if isinstance(linear.scheme, TrainableCodes):
            yield linear.scheme


def _codes_in_training(module: ElasticCalibration) -> Iterator[tuple[TrainableCodes, Tensor]]:
    """The schemes in training whose codes can be trained, each with its weight (O, I) on the device."""
    for linear in _linears_in_training(module):
        if isinstance(linear.scheme, TrainableCodes):
            yield linear.scheme, linear.sliced_weight().to(module.device)


def _forget_averages(module: ElasticCalibration, scheme: TrainableCodes) -> None:
    """Drops what the optimizer keeps of the codes of a scheme."""
    for parameter in scheme.code_parameters():
        module.trainer.optimizers[0].state.pop(parameter, None)
