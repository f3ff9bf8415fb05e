"""What is measured with either path: one token at every depth, and several tokens at equal and at mixed depths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from mobiq_lightning.latency.journal import Candidate, Journal, find
from mobiq_lightning.latency.shapes import Shape, widest
from mobiq_lightning.latency.timing import copy_bandwidth, launch_floor

BATCHES = {"kernels": (1, 2, 4, 8, 16, 32, 64), "reference": (1, 4, 16)}
UNIFORM = (2, 4)
"""Depths at which several tokens are multiplied, beside mixed ones."""
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}


class Products(Protocol):
    """Ways to multiply on one path."""

    name: str
    device: torch.device
    dtype: torch.dtype

    def tokens(self, shape: Shape, count: int) -> Tensor:
        """Random tokens (count, I)."""

    def plain(self, shape: Shape, x: Tensor) -> Candidate:
        """With full-precision weights."""

    def elastic(self, shape: Shape, x: Tensor, bits: list[int]) -> Candidate:
        """With sliced weights, a depth for each token."""

    def forget(self) -> None:
        """Gives the memory of the weights back."""

    def others(self, shape: Shape, x: Tensor) -> Iterator[tuple[str, partial[Candidate]]]:
        """What else is timed beside one token."""


def ceilings(journal: Journal) -> None:
    """Copy bandwidth of the device, and what a call costs that does nothing."""
    bandwidth, floor = (
        copy_bandwidth(journal.clock, COPIED_BYTES[journal.clock.device.type]),
        launch_floor(journal.clock),
    )
    journal.copy_bytes_per_s = bandwidth
    journal.put("ceilings", {"copy_gb_per_s": bandwidth / 1e9, "call_us": floor.us})


def decode(journal: Journal, products: Products, shapes: Sequence[Shape]) -> None:
    """One token at every depth of each shape, beside plain weights and what else there is.

    The first product is timed again at the end: `noise` is by how much it differs.
    """
    for shape in shapes:
        x = products.tokens(shape, 1)
        journal.measure("decode", shape, 1, partial(products.plain, shape, x), "plain")
        for depth in shape.depths:
            make = partial(products.elastic, shape, x, [depth])
            journal.measure("decode", shape, 1, make, f"elastic at {depth} bits")
        for label, other in products.others(shape, x):
            journal.measure("decode", shape, 1, other, label)
    _measure_noise(journal, products, shapes[0])


def batch(journal: Journal, products: Products, shapes: Sequence[Shape]) -> None:
    """Several tokens times the widest shape: all at 2 bits, all at 4 bits, and at all depths in turn."""
    shape = widest(list(shapes))
    for count in BATCHES[products.name]:
        x = products.tokens(shape, count)
        journal.measure("batch", shape, count, partial(products.plain, shape, x), "plain")
        for depth in UNIFORM:
            if depth in shape.depths:
                make = partial(products.elastic, shape, x, [depth] * count)
                journal.measure("batch", shape, count, make, f"elastic at {depth} bits")
        if count > 1:
            mixed = [shape.depths[token % len(shape.depths)] for token in range(count)]
            make = partial(products.elastic, shape, x, mixed)
            journal.measure("batch", shape, count, make, "elastic, mixed")


def _measure_noise(journal: Journal, products: Products, shape: Shape) -> None:
    depth = shape.depths[0]
    first = find(journal.rows, section="decode", shape=shape.name, product="elastic", bits=depth)
    if first is None or journal.seconds_left <= 0:
        journal.not_measured.append("noise (out of time)" if first else "noise (the first product failed)")
        return
    candidate = products.elastic(shape, products.tokens(shape, 1), [depth])
    again = journal.clock.time(candidate.calls, candidate.launches)
    journal.put(
        "noise", {"what": f"{shape.name} at {depth} bits, timed twice", "share": abs(again.us / first["us"] - 1)}
    )
