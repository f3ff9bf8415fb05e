"""Measures what each slice of each input gains the whole model on calibration windows, and reads the stored gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.nn import RoutedInput, SlicedLinear, fixed_depth, full_precision
from mobiq_lightning.runs import GainMethod, LayerGainRow, LayerGainsFile, read_json
from mobiq_lightning.strategies.objectives.logit_distillation import divergences_of_tokens

Readers = Sequence[tuple[RoutedInput, Sequence[SlicedLinear]]]
"""The inputs of a block, each with the linears that read it."""


@torch.no_grad()
def token_gains(
    model: Any, inputs: Sequence[RoutedInput], input_ids: Tensor, reference_bits: int | None = None, batch_size: int = 4
) -> Tensor:
    """Measures by how much each slice lowers the KL divergence to full precision at each token, one input at a time.

    A slice is measured where it is of use: all other inputs read the depth that it reaches, and one reads a slice less. It
    takes a forward pass for each input and each slice after the first, and one for each depth with full precision. Gains of
    inputs are measured alone: that they add up is an approximation.

    Args:
        model: The model with sliced linears, on one device.
        inputs: The I routed inputs of the model.
        input_ids: (N, T) windows on that device.
        reference_bits: One depth, in bits, that all other inputs read instead, whichever slice is measured.
        batch_size: Windows per forward pass.

    Returns:
        (I, S - 1, N * T) float32 in nats, on the host: KL with k slices minus KL with k + 1. It is negative where a
        slice does harm. The mean over tokens is what a slice gains the whole model.
    """
    depths, batches = inputs[0].depths, []
    for ids in input_ids.split(batch_size):
        with full_precision(inputs):
            full = F.log_softmax(_logits(model, ids).float(), dim=-1)
        measure = partial(_divergences, model, inputs, ids, full)
        gains = torch.zeros(len(inputs), len(depths) - 1, ids.numel())
        if reference_bits is None:
            for column, (below, depth) in enumerate(pairwise(depths)):
                whole = measure(depth)
                for row in range(len(inputs)):
                    gains[row, column] = measure(depth, row, below) - whole
        else:
            whole = measure(reference_bits)
            for row in range(len(inputs)):
                found = [whole if bits == reference_bits else measure(reference_bits, row, bits) for bits in depths]
                gains[row] = -torch.stack(found).diff(dim=0)
        batches.append(gains)
    return torch.cat(batches, dim=-1)


def _divergences(
    model: Any,
    inputs: Sequence[RoutedInput],
    ids: Tensor,
    full: Tensor,
    bits: int,
    row: int | None = None,
    bits_of_row: int | None = None,
) -> Tensor:
    """KL (N * T,) to full precision with all inputs at a depth, but the one of `row` at a depth of its own."""
    with ExitStack() as stack:
        stack.enter_context(fixed_depth(inputs, bits))
        if row is not None and bits_of_row is not None:
            stack.enter_context(fixed_depth([inputs[row]], bits_of_row))
        return divergences_of_tokens(_logits(model, ids), full).flatten().cpu()


def gradient_gains(model: Any, blocks: Sequence[Readers], input_ids: Tensor) -> Tensor:
    """Estimates to second order by how much each slice lowers the KL divergence to full precision, weights one by one.

    ``KL = 1/2 sum_w F_w (W_k - W)_w^2`` with F the mean over tokens of the squared gradient of the negative log-likelihood at
    full precision (an empirical Fisher diagonal; the gradients of the tokens of one window are summed before they are
    squared). Biases that a transform changes are left out.

    Args:
        model: The model with sliced linears, on one device.
        blocks: Inputs of each block with their linears, I inputs in all. Gradients are taken one block at a time.
        input_ids: (N, T) windows on that device; each takes a forward and a backward pass for every block.

    Returns:
        (I, S - 1) float64, nats per token.
    """
    inputs = [routed for block in blocks for routed, _ in block]
    n_tokens = input_ids.shape[0] * (input_ids.shape[1] - 1)
    gains = []
    for block in blocks:
        weights = [linear.weight for _, linears in block for linear in linears]
        squares = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            for ids in input_ids.split(1):
                with torch.enable_grad(), full_precision(inputs):
                    logits = _logits(model, ids)[:, :-1].float()
                    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
                    for square, gradient in zip(
                        squares, torch.autograd.grad(loss, weights, allow_unused=True), strict=True
                    ):
                        if gradient is not None:  # experts that no token went to
                            square += gradient.float().square()
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        left = iter(squares)
        gains += [sum(_second_order(linear, next(left) / n_tokens) for linear in linears) for _, linears in block]
    return torch.stack([torch.as_tensor(gain) for gain in gains])


@torch.no_grad()
def _second_order(linear: SlicedLinear, fisher: Tensor) -> Tensor:
    """Estimated gains (S - 1,) of the slices of one linear, float64 on the host."""
    weight = linear.weight.float()
    errors = torch.stack(
        [(fisher * (prefix - weight).square()).double().sum() for prefix in linear.prefixes_on_input()]
    )
    return (errors[:-1] - errors[1:]).cpu() / 2


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def rows_of(
    gains: Mapping[GainMethod, Tensor], names: Sequence[str], sizes: Sequence[int], slice_bits: Sequence[int]
) -> list[LayerGainRow]:
    """Puts measured gains into the rows of layer_gains.json.

    Args:
        gains: By method, gains (I, S - 1) in nats per token.
        names: Names of the I inputs.
        sizes: Number of weights that read each input.
        slice_bits: Bits of the S slices.

    Returns:
        One row for each input and slice after the first.
    """
    return [
        LayerGainRow(
            input=name,
            weights=size,
            slice=number,
            bits=bits,
            gains={method: float(values[row, number - 2]) for method, values in gains.items()},
        )
        for row, (name, size) in enumerate(zip(names, sizes, strict=True))
        for number, bits in enumerate(slice_bits[1:], 2)
    ]


def read_probes(path: Path, names: Sequence[str], slice_bits: Sequence[int]) -> Tensor | None:
    """Reads the probed gains of a run from its layer_gains.json.

    Args:
        path: The file.
        names: Names of the I inputs, in order.
        slice_bits: Bits of the S slices.

    Returns:
        Gains (I, S - 1) float64 in nats per token; None if there is no such file, or it holds no probes of these inputs
        and slices.

    Raises:
        ResultsError: If the file is damaged or from another version.
    """
    if not path.is_file():
        return None
    rows = LayerGainsFile.from_json(read_json(path), path).rows
    expected = [(name, number, bits) for name in names for number, bits in enumerate(slice_bits[1:], 2)]
    if [(row.input, row.slice, row.bits) for row in rows] != expected or any("probes" not in r.gains for r in rows):
        return None
    return torch.tensor([row.gains["probes"] for row in rows], dtype=torch.float64).reshape(
        len(names), len(slice_bits) - 1
    )
