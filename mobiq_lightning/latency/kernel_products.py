"""Makes the products of the Triton kernels that are timed, and products of other libraries to compare them with.

Kernels are imported where they are called, so that every module of `latency` can be imported without Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mobiq_lightning.kernels.form import Form, Prepared
from mobiq_lightning.kernels.layout import KernelWeights, relay
from mobiq_lightning.latency.journal import Candidate
from mobiq_lightning.latency.reference_products import launches_for, plain_product
from mobiq_lightning.latency.shapes import Shape
from mobiq_lightning.latency.timing import cache_bytes, copies_for
from mobiq_lightning.packing import PackedSlices, n_groups


class KernelProducts:
    """Products of the Triton kernels with random sliced weights, and plain products of the same shapes.

    Args:
        device: CUDA device; a CPU where Triton's interpreter runs the kernels, to check this code.
        dtype: dtype of tokens and of plain weights.
    """

    name = "kernels"

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)
        self._weights: tuple[Shape, list[KernelWeights]] | None = None

    def tokens(self, shape: Shape, count: int) -> Tensor:
        """Random tokens (count, I) in the dtype of the products, where I are the columns of the shape."""
        return torch.randn(count, shape.in_features, generator=self.generator, device=self.device).to(self.dtype)

    def weights(self, shape: Shape) -> list[KernelWeights]:
        """Random sliced weights of a shape, as many as no cache holds, kept until another shape is asked for."""
        from mobiq_lightning.kernels.dispatch import INTERPRETED

        if self._weights is None or self._weights[0] != shape:
            self._weights = None  # before there are others
            first = random_kernel_weights(shape, self.device, self.generator)
            read = first.bytes_read(shape.depths[0])
            copies = 2 if INTERPRETED else copies_for(read, cache_bytes(self.device))
            more = (random_kernel_weights(shape, self.device, self.generator) for _ in range(copies - 1))
            self._weights = (shape, [first, *more])
        return self._weights[1]

    def forget(self) -> None:
        """Frees the memory of the kept weights."""
        self._weights = None

    def plain(self, shape: Shape, x: Tensor) -> Candidate:
        """The product of tokens x (M, I) with random full-precision weights of their dtype."""
        return plain_product(shape, x, self.generator)

    def elastic(self, shape: Shape, x: Tensor, bits: list[int]) -> Candidate:
        """The product of prepared tokens with sliced weights: what is launched once the router has decided.

        Args:
            shape: Shape of the weights.
            x: (M, I) tokens, M up to 64.
            bits: Depth in bits that each token reads.
        """
        return elastic_product(x, self.weights(shape), bits)

    def others(self, shape: Shape, x: Tensor) -> Iterator[tuple[str, partial[Candidate]]]:
        """Yields what else is timed with one token x (1, I): preparation, and the products of other libraries.

        Each comes as its name and a function that makes it.
        """
        yield "preparation", partial(self._preparation, shape, x)
        if self.device.type == "cuda":
            yield "int4pack", partial(int4_product, shape, x, self.generator)
            for bits in (4, 2) if find_spec("gemlite") is not None else ():
                yield f"gemlite-{bits}", partial(gemlite_product, shape, x, bits)

    def _preparation(self, shape: Shape, x: Tensor) -> Candidate:
        from mobiq_lightning.kernels.prepare import prepare

        weights = self.weights(shape)[0]
        bits = torch.full((x.shape[0],), shape.depths[0], dtype=torch.int32, device=x.device)
        form = form_for(x)
        return Candidate("preparation", 0, x.nbytes, [partial(prepare, x, weights, form, bits)])


def elastic_product(x: Tensor, weights: Sequence[KernelWeights], bits: list[int]) -> Candidate:
    """The product of up to 64 tokens, prepared beforehand, with sliced weights through `kernels.dispatch.multiply`.

    Args:
        x: (M, I) tokens.
        weights: Weights of one shape that the calls rotate over.
        bits: Depth in bits of each token. An odd depth reads the whole unit of two planes that its last bit is in, and
            `Candidate.n_bytes` counts it.
    """
    from mobiq_lightning.kernels.dispatch import multiply

    prepared = prepared_for(x, weights[0], bits)
    calls = [partial(multiply, x, w, prepared.bits, None, prepared) for w in weights]
    label = bits[0] if len(set(bits)) == 1 else "mixed"
    return Candidate("elastic", label, weights[0].bytes_read(max(bits)), [*calls], launches_for(x))


def prepared_for(x: Tensor, weights: KernelWeights, bits: list[int]) -> Prepared:
    """Prepares tokens for the kernels: puts their columns into the kernels' order and scales them.

    Args:
        x: (M, I) tokens.
        weights: Weights that they are multiplied with, in the kernels' order.
        bits: Depth in bits of each token.
    """
    from mobiq_lightning.kernels.prepare import prepare

    return prepare(x, weights, form_for(x), torch.tensor(bits, dtype=torch.int32, device=x.device))[1]


def form_for(x: Tensor) -> Form:
    """The order and scale in which the kernels want tokens x (M, I) on their device."""
    from mobiq_lightning.kernels.dispatch import INTERPRETED

    capability = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(x.device)
    return Form.of(x.shape[0], x.dtype, capability, INTERPRETED)


def random_kernel_weights(shape: Shape, device: torch.device, generator: torch.Generator) -> KernelWeights:
    """Random sliced weights of a shape, drawn in the kernels' order, since any order of random words is as good."""
    outline = relay([_outline(shape, rows) for rows in shape.out_features])
    place: dict[str, Any] = {"generator": generator, "device": device}
    largest = torch.iinfo(torch.int32).max
    scale = torch.rand(outline.meta.shape, **place) * 0.02 + 0.005
    bias = (torch.rand(outline.meta.shape, **place) - 0.5) * 0.02
    halves = [half.to(torch.bfloat16).view(torch.int16).to(torch.int32) for half in (scale, bias)]
    return replace(
        outline,
        units=torch.randint(-largest - 1, largest, outline.units.shape, dtype=torch.int32, **place),
        meta=(halves[0] & 0xFFFF) | (halves[1] << 16),
        counters=torch.zeros(outline.counters.shape, dtype=torch.int32, device=device),
    )


def _outline(shape: Shape, rows: int) -> PackedSlices:
    """A linear without values, which tells `relay` the sizes."""
    plane = torch.empty(rows, -(-shape.in_features // 8), dtype=torch.uint8, device="meta")
    scale = torch.empty(rows, n_groups(shape.in_features, shape.group_size), dtype=torch.bfloat16, device="meta")
    planes = (plane,) * shape.depths[-1]
    return PackedSlices(planes, (scale, scale), shape.in_features, shape.group_size, shape.slice_bits)


def int4_product(shape: Shape, x: Tensor, generator: torch.Generator) -> Candidate:
    """The product of tokens x (M, I) with random weights by PyTorch's own 4-bit kernel (tinygemm), groups of 128."""
    rows, columns, group = shape.rows, shape.in_features, 128
    n_bytes = rows * columns // 2 + rows * columns // group * 4
    weights = []
    for _ in range(copies_for(n_bytes, cache_bytes(x.device))):
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator, device=x.device)
        scales = torch.randn(columns // group, rows, 2, generator=generator, device=x.device).to(torch.bfloat16)
        weights.append((torch._convert_weight_to_int4pack(codes, 8), scales))
    calls = [partial(torch._weight_int4pack_mm, x, codes, group, scales) for codes, scales in weights]
    return Candidate("int4pack", 4, n_bytes, [*calls], launches_for(x))


def gemlite_product(shape: Shape, x: Tensor, bits: int) -> Candidate:
    """The product of tokens x (M, I) with random weights of `bits` bits by the library gemlite.

    It runs in float16 with groups of 128, and is called once so that gemlite tunes itself before it is timed.
    """
    import gemlite  # type: ignore[import-not-found]

    rows, columns, group = shape.rows, shape.in_features, 128
    n_bytes = rows * columns * bits // 8 + rows * columns // group * 4
    half = gemlite.DType.FP16
    layers = []
    for _ in range(copies_for(n_bytes, cache_bytes(x.device))):
        layer = gemlite.GemLiteLinear(
            bits, group_size=group, in_features=columns, out_features=rows, input_dtype=half, output_dtype=half
        )
        codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=x.device)
        numbers = torch.rand(rows * columns // group, 2, device=x.device).half()
        layer.pack(codes, numbers[:, :1] * 0.02, numbers[:, 1:] * (2**bits - 1), None)
        layers.append(layer)
    tokens = x.half()
    layers[0](tokens)
    return Candidate(f"gemlite-{bits}", bits, n_bytes, [partial(layer, tokens) for layer in layers])
