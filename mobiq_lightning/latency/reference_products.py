"""Makes the products of the CPU reference that are timed, and plain products to compare them with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.kernels import sliced_linear
from mobiq_lightning.latency.journal import Candidate
from mobiq_lightning.latency.shapes import Shape
from mobiq_lightning.latency.timing import cache_bytes, copies_for
from mobiq_lightning.packing import PackedSlices, n_groups

UNPACKED_AT = (2, 4, 8)
"""Depths in bits at which products that unpack their weights anew for every call are timed as well."""


class ReferenceProducts:
    """Products of the CPU reference with random sliced weights whose dequantized form is kept, as models do by default.

    Args:
        device: Device of weights and tokens, a CPU.
        dtype: dtype of tokens, of plain weights, and of the kept dequantized weights.
    """

    name = "reference"

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)
        self._packed: tuple[Shape, PackedSlices] | None = None

    def tokens(self, shape: Shape, count: int) -> Tensor:
        """Random tokens (count, I) in the dtype of the products, where I are the columns of the shape."""
        return torch.randn(count, shape.in_features, generator=self.generator, device=self.device).to(self.dtype)

    def packed(self, shape: Shape) -> PackedSlices:
        """Random sliced weights of a shape, all linears one below the other, kept until another shape is asked for."""
        if self._packed is None or self._packed[0] != shape:
            self._packed = (shape, random_slices(shape, shape.rows, self.device, self.generator))
        return self._packed[1]

    def forget(self) -> None:
        """Frees the memory of the kept weights."""
        self._packed = None

    def plain(self, shape: Shape, x: Tensor) -> Candidate:
        """The product of tokens x (M, I) with random full-precision weights of their dtype."""
        return plain_product(shape, x, self.generator)

    def elastic(self, shape: Shape, x: Tensor, bits: list[int]) -> Candidate:
        """The product of tokens with sliced weights that were dequantized beforehand, once for each depth.

        Args:
            shape: Shape of the weights.
            x: (M, I) tokens.
            bits: Depth in bits of each token.
        """
        packed, depths = self.packed(shape), sorted(set(bits))
        read = len(depths) * shape.n_weights * self.dtype.itemsize
        made = {depth: packed.weight_at(depth).to(self.dtype) for depth in depths}
        copies = copies_for(read, cache_bytes(self.device))
        kept = [made, *({d: w.clone() for d, w in made.items()} for _ in range(copies - 1))]
        wanted = torch.tensor(bits, device=self.device)
        calls = [partial(sliced_linear, x, packed, wanted, weights.__getitem__) for weights in kept]
        return Candidate("elastic", bits[0] if len(depths) == 1 else "mixed", read, [*calls])

    def others(self, shape: Shape, x: Tensor) -> Iterator[tuple[str, partial[Candidate]]]:
        """Yields what else is timed with one token x (1, I): products that unpack their weights anew for every call.

        Each comes as its name and a function that makes it.
        """
        for depth in UNPACKED_AT:
            if depth in shape.depths:
                yield f"unpacked at {depth} bits", partial(self._unpacked, shape, x, depth)

    def _unpacked(self, shape: Shape, x: Tensor, depth: int) -> Candidate:
        packed = self.packed(shape)
        read = sum(plane.nbytes for plane in packed.planes[:depth]) + packed.scale.nbytes + packed.bias.nbytes
        wanted = torch.full((x.shape[0],), depth, device=self.device)
        return Candidate("unpacked", depth, read, [partial(sliced_linear, x, packed, wanted)])


def random_slices(shape: Shape, rows: int, device: torch.device, generator: torch.Generator) -> PackedSlices:
    """Random sliced weights of `rows` rows, with columns, slices and groups of a shape."""
    columns = -(-shape.in_features // 8)
    groups = n_groups(shape.in_features, shape.group_size)
    place = {"generator": generator, "device": device}
    planes = [
        torch.randint(0, 256, (rows, columns), dtype=torch.uint8, **place)  # type: ignore[call-overload]
        for _ in range(shape.depths[-1])
    ]
    scale = torch.rand(rows, groups, **place) * 0.02 + 0.005  # type: ignore[call-overload]
    bias = (torch.rand(rows, groups, **place) - 0.5) * 0.02  # type: ignore[call-overload]
    return PackedSlices(
        tuple(planes),
        (scale.to(torch.bfloat16), bias.to(torch.bfloat16)),
        shape.in_features,
        shape.group_size,
        shape.slice_bits,
    )


def plain_product(shape: Shape, x: Tensor, generator: torch.Generator, copies: int | None = None) -> Candidate:
    """The product of tokens with random full-precision weights by `F.linear`, all linears of an input at once.

    Args:
        shape: Shape of the weights.
        x: (M, I) tokens, whose dtype the weights take.
        generator: Random generator on the device of the tokens.
        copies: Number of weights to rotate over; by default as many as no cache holds.
    """
    n_bytes = shape.n_weights * x.element_size()
    count = copies or copies_for(n_bytes, cache_bytes(x.device))
    weights = [
        (torch.randn(shape.rows, shape.in_features, generator=generator, device=x.device) * 0.02).to(x.dtype)
        for _ in range(count)
    ]
    calls = [partial(F.linear, x, weight) for weight in weights]
    return Candidate("plain", 8 * x.element_size(), n_bytes, [*calls], launches_for(x))


def launches_for(x: Tensor) -> int:
    """Number of launches in one CUDA graph for tokens x (M, I): 64 for up to 64 tokens, 16 up to 512, and 4 beyond."""
    return 64 if x.shape[0] <= 64 else 16 if x.shape[0] <= 512 else 4
