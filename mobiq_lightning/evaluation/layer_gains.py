"""Measures what each slice of each input gains the whole model on calibration windows, and reads the stored gains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.nn import RoutedInput, fixed_depth, full_precision
from mobiq_lightning.runs import GainMethod, LayerGainRow, LayerGainsFile, best_method, read_json
from mobiq_lightning.strategies.objectives.logit_distillation import divergences_of_tokens

_KEPT_EVERY = 16
"""Probes after which what is known is stored."""


@torch.no_grad()
def token_gains(
    model: Any,
    inputs: Sequence[RoutedInput],
    input_ids: Tensor,
    reference_bits: int | None = None,
    batch_size: int = 4,
    known: dict[str, Tensor] | None = None,
    keep: Callable[[], None] = lambda: None,
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
        known: What an earlier process has measured of the same, or nothing yet; what is measured is added to it.
        keep: Function that is called now and then, to store `known`.

    Returns:
        (I, S - 1, N * T) float32 in nats, on the host: KL with k slices minus KL with k + 1. It is negative where a
        slice does harm. The mean over tokens is what a slice gains the whole model.
    """
    known = {} if known is None else known
    depths = inputs[0].depths
    gains = known.setdefault("gains", torch.zeros(len(inputs), len(depths) - 1, input_ids.numel()))
    done, number, place = int(known.get("probes", torch.tensor(0))), 0, 0
    for ids in input_ids.split(batch_size):
        probe, tokens = _Probe(model, inputs, ids), slice(place, place + ids.numel())
        place = tokens.stop
        for row, column in _order(len(inputs), len(depths) - 1, reference_bits is None):
            number += 1
            if number <= done:
                continue
            below, depth = depths[column], depths[column + 1]
            others = depth if reference_bits is None else reference_bits
            gains[row, column, tokens] = probe.measure(others, row, below) - probe.measure(others, row, depth)
            known["probes"] = torch.tensor(number)
            if number % _KEPT_EVERY == 0:
                keep()
    keep()
    return gains


def _order(n_inputs: int, n_gains: int, by_slice: bool) -> Iterator[tuple[int, int]]:
    """Inputs and slices in the order in which they are probed: what two neighbours share is measured once."""
    slices, rows = range(n_gains), range(n_inputs)
    yield from ((row, column) for column in slices for row in rows) if by_slice else product(rows, slices)


class _Probe:
    """Passes of one batch, each with all inputs at a depth but one; what has been measured is kept.

    Args:
        model: The model with sliced linears.
        inputs: Its routed inputs.
        ids: (N, T) windows.
    """

    def __init__(self, model: Any, inputs: Sequence[RoutedInput], ids: Tensor) -> None:
        self.model, self.inputs, self.ids = model, inputs, ids
        self._alike: dict[int, Tensor] = {}
        self._last: tuple[tuple[int, int, int], Tensor] | None = None

    @cached_property
    def full(self) -> Tensor:
        """Log-probabilities (N, T, V) in full precision."""
        with full_precision(self.inputs):
            return F.log_softmax(_logits(self.model, self.ids).float(), dim=-1)

    def measure(self, bits: int, row: int, bits_of_row: int) -> Tensor:
        """KL (N * T,) to full precision with all inputs at a depth, but the one of `row` at a depth of its own."""
        if bits_of_row == bits:
            if bits not in self._alike:
                self._alike[bits] = self._divergence(bits, row, bits)
            return self._alike[bits]
        key = (bits, row, bits_of_row)
        if self._last is None or self._last[0] != key:
            self._last = key, self._divergence(*key)
        return self._last[1]

    def _divergence(self, bits: int, row: int, bits_of_row: int) -> Tensor:
        with fixed_depth(self.inputs, bits), fixed_depth([self.inputs[row]], bits_of_row):
            return divergences_of_tokens(_logits(self.model, self.ids), self.full).flatten().cpu()


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


def read_gains(path: Path, names: Sequence[str], slice_bits: Sequence[int]) -> Tensor | None:
    """Reads the gains of a run from its layer_gains.json: probed ones, or those by gradients if none were probed.

    Args:
        path: The file.
        names: Names of the I inputs, in order.
        slice_bits: Bits of the S slices.

    Returns:
        Gains (I, S - 1) float64 in nats per token; None if there is no such file, or it holds none of these inputs and slices.

    Raises:
        ResultsError: If the file is damaged or from another version.
    """
    if not path.is_file():
        return None
    rows = LayerGainsFile.from_json(read_json(path), path).rows
    expected = [(name, number, bits) for name in names for number, bits in enumerate(slice_bits[1:], 2)]
    if [(row.input, row.slice, row.bits) for row in rows] != expected:
        return None
    method = best_method(set.intersection(*[set(row.gains) for row in rows])) if rows else "probes"
    if method is None:
        return None
    return torch.tensor([row.gains[method] for row in rows], dtype=torch.float64).reshape(
        len(names), len(slice_bits) - 1
    )
