"""Measures that both paths have: one token at every depth, and several tokens at equal and at mixed depths."""

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
"""Depths in bits at which several tokens are multiplied that all read the same depth."""
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}


class Products(Protocol):
    """What a path, the kernels or the reference, must offer to be timed: random tokens, and products with them."""

    name: str
    device: torch.device
    dtype: torch.dtype

    def tokens(self, shape: Shape, count: int) -> Tensor:
        """Random tokens (count, I) in the dtype of the products, where I are the columns of the shape."""

    def plain(self, shape: Shape, x: Tensor) -> Candidate:
        """The product of tokens x (M, I) with random full-precision weights."""

    def elastic(self, shape: Shape, x: Tensor, bits: list[int]) -> Candidate:
        """The product of tokens x (M, I) with random sliced weights, each token reading its depth of `bits`."""

    def forget(self) -> None:
        """Frees the memory of the kept weights."""

    def others(self, shape: Shape, x: Tensor) -> Iterator[tuple[str, partial[Candidate]]]:
        """Yields what else is timed with one token x (1, I), each as its name and a function that makes it."""


def ceilings(journal: Journal) -> None:
    """Measures the copy bandwidth of the device and the time of a call that does almost nothing; notes both."""
    bandwidth, floor = (
        copy_bandwidth(journal.clock, COPIED_BYTES[journal.clock.device.type]),
        launch_floor(journal.clock),
    )
    journal.copy_bytes_per_s = bandwidth
    journal.put("ceilings", {"copy_gb_per_s": bandwidth / 1e9, "call_us": floor.us})


def decode(journal: Journal, products: Products, shapes: Sequence[Shape]) -> None:
    """Times one token at every depth of each shape, plain weights of that shape, and other products of the path.

    The first sliced product is timed again at the end; `noise` in the journal is by how much the two times differ.
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
    """Times several tokens with the widest shape: plain weights, all at 2 bits, all at 4 bits, and mixed depths."""
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
