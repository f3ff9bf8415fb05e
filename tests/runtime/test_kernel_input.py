"""Linears of one input on the kernels: whoever reads them differently, or observes, gets what the reference gives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mobiq_lightning.errors import BitsError
from mobiq_lightning.nn import (
    ElasticLinear,
    Observer,
    RoutedInput,
    common_threshold,
    fixed_depth,
    full_precision,
    meet_budget,
    record_gates,
    record_live_scores,
    record_scores,
    routed_by,
)
from mobiq_lightning.nn.contexts import observed_by
from mobiq_lightning.runtime import KernelInput
from mobiq_lightning.runtime.kernel_input import attach_kernels
from mobiq_lightning.strategies import MLPRouter, ResidualSlices, StaticRouter
from mobiq_lightning.strategies.base import Router

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
BITS = (2, 1, 1, 2, 2)
TOKENS = 6
"""Few enough that a plain reading is routed in the launch that prepares the tokens."""


def linears_of_one_input() -> nn.ModuleList:
    """Two elastic linears, whose router gives tokens different depths."""
    torch.manual_seed(0)
    routed = RoutedInput(MLPRouter(64, len(BITS)), BITS, 2 * 32 * 64)
    with torch.no_grad():
        routed.router.score.weight.mul_(100)  # type: ignore[union-attr,operator]
    linears = nn.ModuleList()
    for _ in range(2):
        packed = ResidualSlices(32, 64, BITS, group_size=32).pack(torch.randn(32, 64))
        linear = ElasticLinear(64, 32, BITS, 32, bias=False)
        linear.load_state_dict(
            {f"plane_{p}": plane for p, plane in enumerate(packed.planes)}
            | {"slice_scale": packed.scale, "slice_bias": packed.bias}
        )
        linear.attach(routed)
        linears.append(linear)
    linears[0].add_module("input", routed)
    return linears.eval().to(DEVICE)


@pytest.fixture
def both() -> tuple[nn.ModuleList, nn.ModuleList]:
    """The same linears on the kernels, and on the reference."""
    ours, theirs = linears_of_one_input(), linears_of_one_input()
    assert attach_kernels(ours, DTYPE) is None
    return ours, theirs


def tokens(count: int = TOKENS) -> Tensor:
    return torch.randn(1, count, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)


def products(linears: nn.ModuleList, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [linear(x) for linear in linears]


def static_router(n_open: int) -> Router:
    router = StaticRouter(64, len(BITS))
    router.threshold.fill_(0.5 - n_open)
    return router.eval().to(DEVICE)


OPENED = torch.tensor([[3, 0, 4, 1, 2, 0]])[..., None] > torch.arange(4)
WAYS: dict[str, Callable[[list[RoutedInput]], AbstractContextManager[Any]]] = {
    "plain": record_gates,  # what is routed in front of the kernels agrees, or nothing below means anything
    "fixed": lambda inputs: fixed_depth(inputs, 4),
    "budget": lambda inputs: meet_budget(inputs, 3.0),
    "common threshold": lambda inputs: common_threshold(inputs, torch.tensor(-torch.inf, device=DEVICE)),
    "opened gates": lambda inputs: common_threshold(inputs, torch.zeros((), device=DEVICE), [OPENED.to(DEVICE)]),
    "another router": lambda inputs: routed_by(inputs, [static_router(2)]),
}


@pytest.mark.parametrize("way", WAYS)
def test_few_tokens_are_read_as_asked(both: tuple[nn.ModuleList, nn.ModuleList], way: str) -> None:
    x, found = tokens(), []
    plain = products(both[0], x)
    for linears in both:
        with WAYS[way]([linears[0].routed]):
            found.append(products(linears, x))
    assert way == "plain" or not torch.equal(found[0][0], plain[0]), "the test needs a reading that differs"
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-1 if GPU else 1e-4, rtol=1e-2)


@pytest.mark.parametrize("record", [record_gates, record_scores, record_live_scores])
def test_few_tokens_are_seen_by_whoever_observes(both: tuple[nn.ModuleList, nn.ModuleList], record: Any) -> None:
    found = []
    for linears in both:
        with record([linears[0].routed]) as records:
            products(linears, tokens())
        assert len(records[0]) == 1
        found.append(records[0][0].detach().float())
    torch.testing.assert_close(*found, atol=1e-1 if GPU else 1e-5, rtol=1e-2)


def test_an_observer_that_is_none_of_ours_is_told_too(both: tuple[nn.ModuleList, nn.ModuleList]) -> None:
    class Look(Observer):
        def on_bits(self, bits: Tensor) -> None:
            seen.append(bits)

    seen: list[Tensor] = []
    linears = both[0]
    with observed_by([linears[0].routed], [Look()]):
        products(linears, tokens())
    assert [bits.shape for bits in seen] == [(1, TOKENS)]


def test_only_plain_readings_are_routed_in_the_launch_that_prepares(both: tuple[nn.ModuleList, nn.ModuleList]) -> None:
    routed, x = both[0][0].routed, tokens()
    kernel = routed.kernel
    assert isinstance(kernel, KernelInput)
    with torch.no_grad():
        assert kernel.routes(x)
        for way, reading in WAYS.items():
            with reading([routed]):
                assert not kernel.routes(x), way
        assert kernel.routes(x)
        assert not kernel.routes(tokens(65))


def test_a_compiled_model_routes_outside_of_that_launch_and_breaks_no_graph_over_it(
    both: tuple[nn.ModuleList, nn.ModuleList],
) -> None:
    kernel = both[0][0].routed.kernel
    assert isinstance(kernel, KernelInput)
    torch._dynamo.reset()
    compiled = torch.compile(kernel.routes, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert compiled(tokens()) is False
        assert kernel.routes(tokens()) is True
    torch._dynamo.reset()


def test_a_tensor_that_one_linear_has_asked_about_is_read_anew_when_the_reading_changes(
    both: tuple[nn.ModuleList, nn.ModuleList],
) -> None:
    x = tokens()
    (first, second), inputs = both[0], [both[0][0].routed]
    with torch.no_grad():
        with fixed_depth(inputs, 2):
            first(x)  # the second linear never asks for its part
        with fixed_depth(inputs, 8):
            found = second(x)
        with fixed_depth([both[1][1].routed], 8):
            wanted = both[1][1](x)
    torch.testing.assert_close(found, wanted, atol=1e-1 if GPU else 1e-4, rtol=1e-2)


def test_linears_of_one_input_are_multiplied_once(both: tuple[nn.ModuleList, nn.ModuleList]) -> None:
    linears, x = both[0], tokens()
    routed = linears[0].routed
    for calls in (1, 2):
        products(linears, x)
        assert int(routed.tokens_read) == calls * TOKENS


def test_planes_in_the_kernels_order_refuse_full_precision_too(both: tuple[nn.ModuleList, nn.ModuleList]) -> None:
    with full_precision([both[0][0].routed]), pytest.raises(BitsError, match="no full-precision weight"):
        products(both[0], tokens())
