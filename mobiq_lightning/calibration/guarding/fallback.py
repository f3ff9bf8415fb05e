"""Giving up what was learned of a block, or of the model, for what was there before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mobiq_lightning.calibration.guarding.probe import fresh_schemes, fresh_transforms
from mobiq_lightning.calibration.stage_training import end_stage
from mobiq_lightning.nn import CalibratedBlock, Learned
from mobiq_lightning.strategies import TrainableCodes

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration

State = list[dict[str, Tensor]]
"""What schemes and transforms of all blocks have learned: a state dict for each block, on the host."""


@torch.no_grad()
def round_block(module: ElasticCalibration, block: int) -> None:
    """Gives up what schemes and transforms of a block have learned, for good: no later stage moves them.

    The code is nested, so all depths fall back together: for nested codes to round-to-nearest, for others to what they find
    without training. Routers stay; those that look at weights see the new ones.
    """
    calibrated = module.sliced.block_at(block)
    module.sliced.caller.bring(block)
    _forget_training(module, calibrated)
    for linear, fresh in fresh_schemes(module.sliced, block):
        linear.scheme.load_state_dict(fresh.state_dict())
    for routed, transform in zip(calibrated.routed_inputs(), fresh_transforms(module.sliced, block), strict=True):
        routed.forget()
        if routed.transform is not None and transform is not None:
            routed.transform.load_state_dict(transform.state_dict())
    for linear in calibrated.sliced_linears():
        if isinstance(linear.scheme, TrainableCodes):
            linear.scheme.freeze(linear.sliced_weight().to(module.device))
    module.record.give_up(block)
    calibrated.show_weights_to_routers()


def state_of(module: ElasticCalibration) -> State:
    """Copies, on the host, of what schemes and transforms of all blocks have learned."""
    return [
        {name: tensor.detach().cpu().clone() for name, tensor in block.state_dict().items() if _is_learned(name)}
        for block in module.sliced.calibrated_blocks()
    ]


@torch.no_grad()
def restore(module: ElasticCalibration, state: State) -> None:
    """Brings back what `state_of` gave. Codes that no later stage moves are fixed, as at the end of any stage."""
    for number, learned in enumerate(state):
        calibrated = module.sliced.block_at(number)
        module.sliced.caller.bring(number)
        _forget_training(module, calibrated)
        calibrated.load_state_dict(learned, strict=False)
        for routed in calibrated.routed_inputs():
            routed.forget()
    end_stage(module)
    for number in range(len(state)):
        module.sliced.caller.bring(number)
        module.sliced.block_at(number).show_weights_to_routers()


def _is_learned(name: str) -> bool:
    return name.startswith("schemes.") or ".transform." in name


def _forget_training(module: ElasticCalibration, block: CalibratedBlock) -> None:
    """Drops gradients and the optimizer's averages of what is about to be replaced, perhaps by another size."""
    kinds: tuple[Learned, ...] = ("ranges", "codes", "transforms")
    for kind in kinds:
        for parameter in block.parameters_of(kind):
            parameter.grad = None
            module.trainer.optimizers[0].state.pop(parameter, None)
    for linear in block.sliced_linears():
        linear.scheme.forget()
