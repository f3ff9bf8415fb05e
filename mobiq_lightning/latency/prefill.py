"""Times products of many tokens, on CUDA only. Reading weights costs little there, so unpacking them may not pay."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.kernels.layout import KernelWeights
from mobiq_lightning.kernels.routing import MAX_ROUTED
from mobiq_lightning.latency.journal import Candidate, Journal
from mobiq_lightning.latency.kernel_products import KernelProducts, form_for
from mobiq_lightning.latency.reference_products import launches_for
from mobiq_lightning.latency.shapes import Shape, widest

TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
UNIFORM = (2, 4)


def prefill(
    journal: Journal, products: KernelProducts, shapes: Sequence[Shape], counts: Sequence[int] = TOKENS
) -> None:
    """Times the widest shape with 64 to 4096 tokens in three ways and adds the rows to the journal.

    The three are plain weights, the grouped kernel, and dequantized weights that are made anew for each product. What
    runs in front of a product (preparation, sorting of tokens by depth) is part of what is timed.

    Args:
        journal: Journal that takes the rows.
        products: Source of random weights and tokens.
        shapes: Shapes of which the widest is taken.
        counts: Numbers of tokens.
    """
    shape = widest(list(shapes))
    for count in counts:
        x = products.tokens(shape, count)
        journal.measure("prefill", shape, count, partial(products.plain, shape, x), "plain")
        for depth in (d for d in UNIFORM if d in shape.depths):
            for make in (grouped_tokens, dequantized_uniform):
                label = f"{make.__name__.partition('_')[0]} at {depth} bits"
                work = partial(_with_weights, make, products, shape, x, [depth] * count)
                journal.measure("prefill", shape, count, work, label)
        mixed = [shape.depths[token % len(shape.depths)] for token in range(count)]
        for make in (grouped_tokens, dequantized_mixed):
            label = f"{make.__name__.partition('_')[0]}, mixed"
            journal.measure("prefill", shape, count, partial(_with_weights, make, products, shape, x, mixed), label)


def grouped_tokens(x: Tensor, weights: Sequence[KernelWeights], bits: list[int]) -> Candidate:
    """The product of tokens with sliced weights by the grouped kernel, preparation included.

    Args:
        x: (M, I) tokens.
        weights: Weights that the calls rotate over.
        bits: Depth in bits of each token.
    """
    depths = torch.tensor(bits, dtype=torch.int32, device=x.device)
    calls = [partial(_grouped, x, w, depths) for w in _few(x, weights)]
    return _candidate("grouped", x, weights[0], bits, calls)


def dequantized_uniform(x: Tensor, weights: Sequence[KernelWeights], bits: list[int]) -> Candidate:
    """The product of tokens that all read one depth: weights are dequantized to that depth, then cuBLAS multiplies.

    Args:
        x: (M, I) tokens.
        weights: Weights that the calls rotate over.
        bits: Depth in bits of each token, all the same.
    """
    calls = [partial(_uniform, x, w, bits[0]) for w in _few(x, weights)]
    return _candidate("dequantized", x, weights[0], bits, calls)


def dequantized_mixed(x: Tensor, weights: Sequence[KernelWeights], bits: list[int]) -> Candidate:
    """The product of tokens of mixed depths: weights are dequantized to every depth, then one grouped product is taken.

    Args:
        x: (M, I) tokens; they are sorted by depth.
        weights: Weights that the calls rotate over.
        bits: Depth in bits of each token.
    """
    depths = torch.tensor(bits, dtype=torch.int32, device=x.device)
    calls = [partial(_mixed, x, w, depths) for w in _few(x, weights)]
    return _candidate("dequantized", x, weights[0], bits, calls)


def _grouped(x: Tensor, weights: KernelWeights, depths: Tensor) -> Tensor:
    from mobiq_lightning.kernels.grouped import grouped
    from mobiq_lightning.kernels.prepare import prepare

    return grouped(prepare(x, weights, form_for(x), depths)[1], weights)


def _uniform(x: Tensor, weights: KernelWeights, depth: int) -> Tensor:
    from mobiq_lightning.kernels.dequantize import dequantize

    return F.linear(x, dequantize(weights, depth, x.dtype))


def _mixed(x: Tensor, weights: KernelWeights, depths: Tensor) -> Tensor:
    from mobiq_lightning.kernels.dequantize import dequantized_product
    from mobiq_lightning.kernels.grouped import plan_tiles

    return dequantized_product(x, weights, plan_tiles(depths, len(weights.depths), MAX_ROUTED))


def _with_weights(make: object, products: KernelProducts, shape: Shape, x: Tensor, bits: list[int]) -> Candidate:
    assert callable(make)
    made: Candidate = make(x, products.weights(shape), bits)
    return made


def _few(x: Tensor, weights: Sequence[KernelWeights]) -> Sequence[KernelWeights]:
    """The first weights, no more of them than one CUDA graph has launches."""
    return weights[: launches_for(x)]


def _candidate(
    product: str, x: Tensor, weights: KernelWeights, bits: list[int], calls: list[partial[Tensor]]
) -> Candidate:
    label = bits[0] if len(set(bits)) == 1 else "mixed"
    return Candidate(product, label, weights.bytes_read(max(bits)), [*calls], launches_for(x))
