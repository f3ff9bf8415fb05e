"""Sliced and elastic linears, and the routed input they share."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from mobiq_lightning.errors import BitsError
from mobiq_lightning.kernels import sliced_linear
from mobiq_lightning.nn import (
    ElasticLinear,
    RoutedInput,
    SlicedLinear,
    fixed_depth,
    full_precision,
    meet_budget,
    record_gates,
    routed_inputs,
)
from mobiq_lightning.strategies import MLPRouter, ResidualSlices

BITS = (2, 1, 1, 2, 2)


class Pair(NamedTuple):
    """A linear and its two sliced forms, on one routed input."""

    linear: nn.Linear
    sliced: SlicedLinear
    elastic: ElasticLinear
    routed: RoutedInput


@pytest.fixture
def pair() -> Pair:
    torch.manual_seed(0)
    linear = nn.Linear(44, 24).requires_grad_(False)
    routed = RoutedInput(MLPRouter(44, len(BITS)), BITS, linear.weight.numel())
    with torch.no_grad():  # scores spread widely enough that tokens differ
        routed.router.score.weight.mul_(100)  # type: ignore[union-attr,operator]
    scheme = ResidualSlices(24, 44, BITS, group_size=16)
    sliced = SlicedLinear(linear, scheme, routed)
    elastic = ElasticLinear(44, 24, BITS, 16, bias=True)
    packed = scheme.pack(linear.weight)
    elastic.load_state_dict(
        {f"plane_{p}": plane for p, plane in enumerate(packed.planes)}
        | {"slice_scale": packed.scale, "slice_bias": packed.bias, "bias": linear.bias.detach()}
    )
    elastic.attach(routed)
    return Pair(linear, sliced, elastic, routed.eval())


def test_full_precision_is_the_source_layer(pair: Pair) -> None:
    linear, sliced, routed = pair.linear, pair.sliced, pair.routed
    x = torch.randn(3, 5, 44)
    with full_precision([routed]):
        assert torch.equal(sliced(x), linear(x))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_both_forms_agree_bit_by_bit_at_a_fixed_depth(pair: Pair, bits: int) -> None:
    sliced, elastic, routed = pair.sliced, pair.elastic, pair.routed
    x = torch.randn(7, 44)
    with torch.no_grad(), fixed_depth([routed], bits):
        weight_product = torch.nn.functional.linear(x, elastic.weight_at(bits)) + elastic.bias
        assert torch.equal(elastic(x), weight_product)
        torch.testing.assert_close(sliced(x), elastic(x), atol=1e-5, rtol=0)


def test_both_forms_agree_on_tokens_of_mixed_depth(pair: Pair) -> None:
    sliced, elastic, routed = pair.sliced, pair.elastic, pair.routed
    x = torch.randn(4, 50, 44)
    routed.router.threshold.fill_(-2.0)
    with torch.no_grad(), record_gates([routed]) as records:
        ours, theirs = elastic(x), sliced(x)
    assert len(records[0][0].unique()) > 2, "the test needs tokens of several depths"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_each_token_of_a_mixed_batch_is_what_it_is_alone(pair: Pair) -> None:
    elastic = pair.elastic
    x = torch.randn(40, 44)
    bits = torch.tensor([2, 3, 4, 6, 8]).repeat(8)
    mixed = sliced_linear(x, elastic.packed, bits)
    for token in range(40):
        alone = elastic.packed.weight_at(int(bits[token])) @ x[token]
        torch.testing.assert_close(mixed[token], alone, atol=1e-5, rtol=0)


def test_no_tokens_give_no_outputs(pair: Pair) -> None:
    elastic = pair.elastic
    assert sliced_linear(torch.zeros(0, 44), elastic.packed, torch.zeros(0, dtype=torch.long)).shape == (0, 24)


def test_linears_of_one_input_share_one_evaluation_of_the_router(pair: Pair) -> None:
    sliced, elastic, routed = pair.sliced, pair.elastic, pair.routed
    calls = []
    scores = routed.router.scores
    routed.router.scores = lambda x: calls.append(1) or scores(x)  # type: ignore[assignment,func-returns-value]
    x = torch.randn(6, 44)
    with torch.no_grad():
        sliced(x)
        elastic(x)
        assert len(calls) == 1
        sliced(torch.randn(6, 44))
        assert len(calls) == 2


def test_a_budget_is_met_exactly_on_the_tokens_at_hand(pair: Pair) -> None:
    sliced, routed = pair.sliced, pair.routed
    for bits in (2.0, 2.6, 3.5, 7.0, 8.0):
        with torch.no_grad(), meet_budget([routed], bits), record_gates([routed]) as records:
            sliced(torch.randn(500, 44))
        assert float(records[0][0].mean()) == pytest.approx(bits, abs=0.005)


def test_gradients_reach_ranges_and_router_through_the_gates(pair: Pair) -> None:
    sliced, routed = pair.sliced, pair.routed
    routed.train()
    with meet_budget([routed], 3.0):
        sliced(torch.randn(100, 44)).square().sum().backward()
    learned = [*sliced.scheme.parameters(), *routed.router.parameters()]
    assert all(bool((p.grad != 0).any()) for p in learned)
    assert sliced.weight.grad is None


def test_a_depth_that_is_no_prefix_is_refused(pair: Pair) -> None:
    with pytest.raises(BitsError, match="5 bits"), fixed_depth([pair.routed], 5):
        pass


def test_moving_the_block_does_not_move_what_is_trained(pair: Pair) -> None:
    sliced = pair.sliced
    assert {name for name, _ in sliced.named_parameters()} == {"weight", "bias"}
    assert routed_inputs(sliced) == [pair.routed]
