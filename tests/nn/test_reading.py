"""How inputs are read within `with` statements, who observes it, and that everything is as before afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mobiq_lightning.errors import BitsError
from mobiq_lightning.nn import (
    Borrowed,
    ElasticLinear,
    FixedSlices,
    RoutedInput,
    SlicedLinear,
    common_threshold,
    fixed_depth,
    full_precision,
    meet_budget,
    read_as,
    record_gates,
    record_live_scores,
    record_scores,
    routed_by,
    transformed_by,
)
from mobiq_lightning.nn.contexts import observed_by
from mobiq_lightning.nn.observers import BitsRecorder
from mobiq_lightning.nn.reading import CommonThreshold, FullPrecision, MeetBudget, Routed
from mobiq_lightning.strategies import MLPRouter, ResidualSlices, StaticRouter
from mobiq_lightning.strategies.transform_base import StoredTransform

BITS = (2, 1, 1, 2, 2)


def routed_input() -> RoutedInput:
    torch.manual_seed(0)
    routed = RoutedInput(MLPRouter(44, len(BITS)), BITS, 24 * 44)
    with torch.no_grad():
        routed.router.score.weight.mul_(100)  # type: ignore[union-attr,operator]
    return routed.eval()


def static_router(n_open: int) -> StaticRouter:
    router = StaticRouter(44, len(BITS))
    router.threshold.fill_(0.5 - n_open)
    return router.eval()


@pytest.fixture
def routed() -> RoutedInput:
    return routed_input()


@pytest.fixture
def sliced(routed: RoutedInput) -> SlicedLinear:
    return SlicedLinear(nn.Linear(44, 24).requires_grad_(False), ResidualSlices(24, 44, BITS, group_size=16), routed)


WAYS: dict[str, Callable[[RoutedInput], AbstractContextManager[Any]]] = {
    "full precision": lambda routed: full_precision([routed]),
    "a fixed depth": lambda routed: fixed_depth([routed], 4),
    "a budget": lambda routed: meet_budget([routed], 3.0),
    "a common threshold": lambda routed: common_threshold([routed], torch.tensor(-1.0)),
    "another router": lambda routed: routed_by([routed], [static_router(2)]),
    "recorded gates": lambda routed: record_gates([routed]),
    "recorded scores": lambda routed: record_scores([routed]),
    "recorded live scores": lambda routed: record_live_scores([routed]),
    "another transform": lambda routed: transformed_by([routed], [StoredTransform(44, ["scale"])]),
}


@pytest.mark.parametrize("way", WAYS)
def test_afterwards_all_is_as_before_even_if_it_failed(routed: RoutedInput, way: str) -> None:
    before = (routed.reading, routed.observers, routed.transform, set(dict(routed.named_modules())))

    def fail() -> None:
        with WAYS[way](routed):
            assert (routed.reading, routed.observers, routed.transform) != before[:3]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (routed.reading, routed.observers, routed.transform, set(dict(routed.named_modules()))) == before


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_that_was_read_before_is_read_anew(sliced: SlicedLinear, way: str) -> None:
    x, calls = torch.randn(6, 44), []
    scores = sliced.routed.router.scores
    sliced.routed.router.scores = lambda x: calls.append(1) or scores(x)  # type: ignore[assignment,func-returns-value]
    with torch.no_grad():
        sliced(x)
        with WAYS[way](sliced.routed):
            sliced(x)
        n = len(calls)
        sliced(x)
    assert len(calls) == n + 1


@pytest.mark.parametrize(
    ("reading", "plain"),
    [
        (Routed(), True),
        (FullPrecision(), False),
        (FixedSlices(5), False),
        (Routed(MeetBudget(3.0)), False),
        (Routed(CommonThreshold(torch.zeros(()))), False),
        (Routed(CommonThreshold(torch.zeros(2), torch.ones(2))), False),
        (Routed(router=static_router(1)), False),
    ],
)
def test_only_ones_own_threshold_unobserved_is_read_plainly(routed: RoutedInput, reading: Any, plain: bool) -> None:
    with read_as([routed], [reading]):
        for at_hand in (routed, copy.deepcopy(routed)):  # a copy of a served model is served too
            assert at_hand.reads_plainly is plain
        with observed_by([routed], [BitsRecorder()]):
            assert not routed.reads_plainly


def test_the_innermost_reading_decides_and_all_observers_are_told(sliced: SlicedLinear) -> None:
    routed, x = sliced.routed, torch.randn(400, 44)
    with torch.no_grad(), meet_budget([routed], 3.0), record_gates([routed]) as outer:
        with fixed_depth([routed], 8), full_precision([routed]):
            assert torch.equal(sliced(x), nn.functional.linear(x, sliced.weight, sliced.bias))
        with meet_budget([routed], 6.0), record_gates([routed]) as inner:
            sliced(x)
        sliced(x)
    assert [float(bits.mean()) for bits in outer[0]] == pytest.approx([6.0, 3.0], abs=0.01)
    assert len(inner[0]) == 1
    assert inner[0][0] is outer[0][0]


def test_another_router_is_no_part_of_the_model(routed: RoutedInput) -> None:
    names = set(routed.state_dict())
    with torch.no_grad(), routed_by([routed], [static_router(2)]):
        assert set(routed.state_dict()) == names
        assert routed.bits_of(routed.gates(torch.randn(7, 44))).tolist() == [4.0] * 7


def test_gates_that_are_decided_open_whatever_the_scores_are(routed: RoutedInput) -> None:
    opened = torch.tensor([[True, False, False, False], [True, True, True, False]])
    with torch.no_grad(), common_threshold([routed], torch.tensor(100.0), [opened]):
        assert routed.bits_of(routed.gates(torch.randn(2, 44))).tolist() == [3.0, 6.0]


def test_live_scores_have_gradients_for_the_router_alone(routed: RoutedInput) -> None:
    x = torch.randn(5, 44, requires_grad=True)
    with torch.no_grad(), record_live_scores([routed]) as live, record_scores([routed]) as plain:
        routed.gates(x)
    live[0][0].sum().backward()
    assert torch.equal(live[0][0].detach(), plain[0][0])
    assert not plain[0][0].requires_grad
    assert x.grad is None
    assert all(bool((p.grad != 0).any()) for p in routed.router.parameters())


@pytest.mark.parametrize("way", ["full precision", "a fixed depth"])
def test_gates_are_refused_where_none_are_decided(routed: RoutedInput, way: str) -> None:
    with WAYS[way](routed), pytest.raises(RuntimeError, match="no gates while they are read as F"):
        routed.gates(torch.randn(2, 44))


def test_bit_planes_refuse_full_precision_which_they_do_not_hold(routed: RoutedInput) -> None:
    elastic = ElasticLinear(44, 24, BITS, 16, bias=False)
    with pytest.raises(RuntimeError, match="attach"):
        elastic(torch.randn(2, 44))
    elastic.attach(routed)
    with full_precision([routed]), pytest.raises(BitsError, match=r"24x44.* no full-precision weight; .*8 bits"):
        elastic(torch.randn(2, 44))
    assert elastic(torch.randn(2, 44)).shape == (2, 24)


def test_a_module_that_is_borrowed_is_not_registered_and_is_copied_with_its_owner() -> None:
    class Borrower(nn.Module):
        def __init__(self, lent: nn.Module) -> None:
            super().__init__()
            self.lent = Borrowed(lent)

        def forward(self, x: Tensor) -> Tensor:
            return self.lent.value(x)  # type: ignore[no-any-return]

    owner = nn.ModuleList([nn.Linear(3, 2)])
    owner.append(Borrower(owner[0]))
    assert not list(owner[1].parameters())
    assert set(owner.state_dict()) == {"0.weight", "0.bias"}
    both = copy.deepcopy(owner)
    assert both[1].lent.value is both[0] is not owner[0]
