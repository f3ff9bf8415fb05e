"""Products of many tokens, CUDA only: where reading plain weights costs little, what do sliced ones lose?"""

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
    """The widest shape times 64 to 4096 tokens: the grouped kernel, and plain weights made first, beside plain weights.

    What runs in front of a product (preparation, sorting of tokens by depth) is part of what is timed.

    Args:
        journal: Takes the rows.
        products: Make weights and tokens.
        shapes: To choose from.
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
    """Preparation and the grouped kernel.

    Args:
        x: (M, I).
        weights: To rotate over.
        bits: Depth of each token.
    """
    depths = torch.tensor(bits, dtype=torch.int32, device=x.device)
    calls = [partial(_grouped, x, w, depths) for w in _few(x, weights)]
    return _candidate("grouped", x, weights[0], bits, calls)


def dequantized_uniform(x: Tensor, weights: Sequence[KernelWeights], bits: list[int]) -> Candidate:
    """Plain weights at the one depth of all tokens, then cuBLAS.

    Args:
        x: (M, I) tokens.
        weights: Weights to rotate over.
        bits: Depth of each token, all the same.
    """
    calls = [partial(_uniform, x, w, bits[0]) for w in _few(x, weights)]
    return _candidate("dequantized", x, weights[0], bits, calls)


def dequantized_mixed(x: Tensor, weights: Sequence[KernelWeights], bits: list[int]) -> Candidate:
    """Plain weights at every depth, then one grouped product over sorted tokens.

    Args:
        x: (M, I) tokens.
        weights: Weights to rotate over.
        bits: Depth of each token.
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
    """As many weights as there are launches to rotate."""
    return weights[: launches_for(x)]


def _candidate(
    product: str, x: Tensor, weights: KernelWeights, bits: list[int], calls: list[partial[Tensor]]
) -> Candidate:
    label = bits[0] if len(set(bits)) == 1 else "mixed"
    return Candidate(product, label, weights.bytes_read(max(bits)), [*calls], launches_for(x))
