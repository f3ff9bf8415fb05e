"""Reads a model in full precision, or as uncalibrated nested codes of any depth."""

from __future__ import annotations

from typing import Any

from torch import nn

from mobiq_lightning.nn import BlockLayout, RoutedInput, SlicedLinear
from mobiq_lightning.packing import n_groups
from mobiq_lightning.strategies import ResidualSlices, StaticRouter
from mobiq_lightning.strategies.base import DEFAULT_SLICE_BITS


def wrap_for_rounding(
    model: nn.Module, layout: BlockLayout, group_size: int, bits: tuple[int, ...] = DEFAULT_SLICE_BITS
) -> tuple[list[RoutedInput], float]:
    """Wraps the decoder linears of a model in place, so that they can be read as uncalibrated nested codes.

    Args:
        model: Model whose linears are wrapped.
        layout: Place of its decoder blocks.
        group_size: Columns that share a range.
        bits: Bits of the slices; they decide which depths can be read, not the codes.

    Returns:
        The routed inputs, whose depth or full precision can be set; and the bits per weight spent on scales and biases, and on
        matrices in blocks that are not rounded.
    """
    spent = n_weights = 0.0
    routed = RoutedInput(StaticRouter(1, len(bits)), bits, 0)
    layout.open(model)
    for block in layout.find(model):
        for name in [name for names in layout.group_linears(block, "input") for name in names]:
            linear: Any = block.get_submodule(name)
            columns = min(group_size, linear.in_features)  # other codes' groups may be whole rows
            scheme = ResidualSlices(linear.out_features, linear.in_features, bits, columns).to(linear.weight.device)
            spent += 32 * linear.out_features * n_groups(linear.in_features, columns)
            n_weights += linear.weight.numel()
            block.set_submodule(name, SlicedLinear(linear, scheme, routed))
        for kept in layout.kept(block).values():
            spent, n_weights = spent + 8 * kept.element_size() * kept.numel(), n_weights + kept.numel()
    return [routed], spent / n_weights
