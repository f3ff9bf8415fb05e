"""Runs an elastic model that is larger than its device, with the kernels where they run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mobiq_lightning.nn import ElasticLinear, OneBlockAtATime, RoutedInput
from mobiq_lightning.runtime.kernel_input import attach_kernels


def elastic_block_by_block(model: Any, blocks: Sequence[nn.Module], device: torch.device) -> OneBlockAtATime:
    """Has a loaded elastic model run on a device with one of its decoder blocks there at a time, from now on.

    The weights of a block are brought into the kernels' order when it comes, where the whole model would be multiplied by them.
    Bits that are read are not counted; `record_gates` records them.

    Args:
        model: The `ElasticModel`, on the host.
        blocks: Its decoder blocks.
        device: Where they run.

    Returns:
        What brings them.
    """
    wanted = device.type == "cuda" if model.kernels.wanted is None else model.kernels.wanted
    model.switch_kernels(False)  # for the model as a whole
    model.keep_weights(0)  # they would have to stay on the device

    def came(block: nn.Module) -> None:
        if wanted and (missing := attach_kernels(block, model.dtype)) is not None and device.type == "cuda":
            warnings.warn(f"the model runs on the slow reference: {missing}", stacklevel=2)

    return OneBlockAtATime(model, blocks, device, came, _drop_kernels)


def _drop_kernels(block: nn.Module) -> None:
    """Lets go of the weights in the kernels' order: the planes that they were made of are on the host."""
    for module in block.modules():
        if isinstance(module, RoutedInput):
            module.kernel = None
        elif isinstance(module, ElasticLinear):
            module.own_kernel = None
