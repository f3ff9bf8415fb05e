"""What an elastic model stores beside its codes."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import nn

from mobiq_lightning.nn.elastic_linear import ElasticLinear, routed_inputs
from mobiq_lightning.packing import compact, kind_of

_BLOCK = re.compile(r".*?\.(?=\d+\.)")
"""What the names of modules in decoder blocks begin with, up to the number of the block."""


class StoredBits(NamedTuple):
    """What an elastic model stores beside its codes, per weight of the matrices in its blocks.

    Args:
        overhead: Bits of scales and biases, or tables, of what is stored of transformed inputs, and of matrices that are not
            sliced, such as gates of experts.
        routers: Bits of the routers.
        sliced: Part of these weights that is sliced.
    """

    overhead: float
    routers: float
    sliced: float


def stored_bits(model: nn.Module) -> StoredBits:
    """Counts what an elastic model stores beside its codes."""
    linears = [m for m in model.modules() if isinstance(m, ElasticLinear)]
    kept = _kept_matrices(model)
    sliced = sum(linear.n_weights for linear in linears)
    n_weights = sliced + sum(p.numel() for p in kept)
    overhead = sum(linear.overhead_bits * linear.n_weights for linear in linears) / n_weights
    overhead += sum(_transform_bits(linear) for linear in linears) / n_weights
    overhead += sum(8 * p.element_size() * p.numel() for p in kept) / n_weights
    stored = [compact(value) for routed in routed_inputs(model) for value in routed.router.state_dict().values()]
    routers = sum(8 * value.element_size() * value.numel() for value in stored) / n_weights
    return StoredBits(overhead, routers, sliced / n_weights)


def _kept_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices in blocks that are in full precision; what belongs to inputs is none of them."""
    found = (_BLOCK.match(name) for name, module in model.named_modules() if isinstance(module, ElasticLinear))
    blocks = tuple({match.group() for match in found if match is not None})
    return [
        p for name, p in model.named_parameters() if p.ndim > 1 and kind_of(name) == "other" and name.startswith(blocks)
    ]


def _transform_bits(linear: ElasticLinear) -> int:
    """Bits of an input's transform: scale and shift once per input, and for a shift the bias of each linear."""
    transform = linear.routed.transform
    if transform is None:
        return 0
    stored = transform.stored()
    shared = sum(32 * value.numel() for value in stored.values()) if linear.carries_input else 0
    own = (
        torch.finfo(linear.bias.dtype).bits * linear.out_features
        if "shift" in stored and linear.bias is not None
        else 0
    )
    return shared + own
