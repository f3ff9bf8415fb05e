"""Which layers read which slices: rates, the knapsack, and the routers that allocate layers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mobiq_lightning.evaluation.controls import control_router, control_thresholds
from mobiq_lightning.nn import RoutedInput, record_gates, routed_by
from mobiq_lightning.packing import depths_of
from mobiq_lightning.runtime import Dial
from mobiq_lightning.strategies import (
    GradientLayerRouter,
    LearnedLayerRouter,
    MLPRouter,
    ProbedLayerRouter,
    ThresholdTask,
)
from mobiq_lightning.strategies.allocation import best_depths, concave_rates, nested_depths
from mobiq_lightning.strategies.thresholds import threshold_for_budget

BITS = (2, 1, 1, 2)
SIZES = [3000, 1000, 5400, 2700] * 2
HALF_STEP = 5400 / sum(SIZES)
"""Half of what the widest slice of the largest input adds to the average."""


def spent(n_open: list[int], sizes: list[int] = SIZES, slice_bits: tuple[int, ...] = BITS) -> float:
    depths = depths_of(slice_bits)
    return sum(depths[n] * size for n, size in zip(n_open, sizes, strict=True)) / sum(sizes)


def falling_gains(seed: int = 0, n_inputs: int = len(SIZES)) -> torch.Tensor:
    """(inputs, S - 1) gains of which each is a share of the one before."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(n_inputs, 1, generator=generator, dtype=torch.float64) + 0.1
    return first * 0.3 ** torch.arange(len(BITS) - 1)


def worth_of(gains: torch.Tensor) -> torch.Tensor:
    return torch.cat([gains.new_zeros(len(gains), 1), gains.cumsum(1)], dim=1)


def measured(kind: Any, gains: torch.Tensor, sizes: list[int] = SIZES) -> list[Any]:
    routers = [kind(4, len(BITS)) for _ in sizes]
    for router, row, size in zip(routers, gains, sizes, strict=True):
        router.observe_gains(row, BITS, size)
    return routers


def depths_at(routers: list[Any], budgets: list[float], sizes: list[int] = SIZES) -> list[list[int]]:
    """Slices after the base that each input opens at each budget."""
    scores = [router.scores(torch.randn(3, 4)).detach() for router in routers]
    table = type(routers[0]).thresholds_for(ThresholdTask(scores, sizes, BITS, budgets))
    return [[int((s[0] > t[c]).sum()) for s, t in zip(scores, table, strict=True)] for c in range(len(budgets))]


class TestRates:
    def test_a_big_gain_behind_a_small_one_is_pooled_with_it(self) -> None:
        assert concave_rates([0.1, 0.9, 0.2], (2, 1, 1, 2)) == pytest.approx([0.5, 0.5, 0.1])

    def test_bits_of_slices_count_in_the_pool(self) -> None:
        assert concave_rates([0.1, 0.2, 2.0], (2, 1, 1, 2)) == pytest.approx([2.3 / 4] * 3)

    def test_gains_that_fall_are_left_alone(self) -> None:
        assert concave_rates([0.5, 0.2, 0.1], (2, 1, 1, 2)) == pytest.approx([0.5, 0.2, 0.05])


class TestBestDepths:
    @pytest.mark.parametrize("target", [2.4, 3.1, 4.0, 5.3])
    def test_it_finds_what_trying_all_allocations_finds(self, target: float) -> None:
        sizes, worth = SIZES[:5], worth_of(torch.randn(5, 3, dtype=torch.float64, generator=torch.manual_seed(1)))
        found = best_depths(worth, sizes, BITS, target)
        every = [list(choice) for choice in itertools.product(range(4), repeat=5)]
        nearest = min(abs(spent(choice, sizes) - target) for choice in every)
        near = [choice for choice in every if abs(spent(choice, sizes) - target) <= max(nearest, 0.005) + 1e-9]
        value = lambda choice: sum(float(worth[i, n]) for i, n in enumerate(choice))
        assert value(found) == pytest.approx(max(map(value, near)))

    def test_an_input_whose_slices_do_nothing_gets_none_before_all_others_have_theirs(self) -> None:
        gains = falling_gains()
        gains[2] = 0.0
        rest = (sum(SIZES) - SIZES[2]) / sum(SIZES)
        assert best_depths(worth_of(gains), SIZES, BITS, 2 + 4 * rest)[2] == 0
        assert best_depths(worth_of(gains), SIZES, BITS, 6)[2] == 3

    def test_budgets_are_met_within_a_hundredth_of_a_bit_even_where_sizes_have_no_common_divisor(self) -> None:
        sizes = [1048573, 4194301, 2097143, 11272187] * 16
        worth = worth_of(falling_gains(n_inputs=64))
        for target in (2.5, 3.25, 4.1):
            found = best_depths(worth, sizes, BITS, target)
            assert spent(found, sizes) == pytest.approx(target, abs=0.01)

    def test_nested_depths_only_grow_with_the_budget(self) -> None:
        budgets = [2 + 0.25 * n for n in range(17)]
        worth = worth_of(torch.randn(len(SIZES), 3, dtype=torch.float64, generator=torch.manual_seed(2)))
        found = nested_depths(worth, SIZES, BITS, budgets[::-1])[::-1]
        assert all(
            low <= high for lower, upper in itertools.pairwise(found) for low, high in zip(lower, upper, strict=True)
        )
        assert [spent(n_open) for n_open in found] == pytest.approx(budgets, abs=HALF_STEP)


@pytest.mark.parametrize("kind", [GradientLayerRouter, ProbedLayerRouter])
class TestGainRouters:
    def test_its_depths_are_those_of_greatest_gain(self, kind: Any) -> None:
        gains = falling_gains()
        (found,) = depths_at(measured(kind, gains), [3.3])
        assert found == best_depths(worth_of(gains), SIZES, BITS, 3.3, window=0.02)
        assert spent(found) == pytest.approx(3.3, abs=0.02)

    def test_depths_are_nested_and_near_each_budget(self, kind: Any) -> None:
        budgets = [2 + 0.25 * n for n in range(17)]
        found = depths_at(measured(kind, falling_gains(3)), budgets)
        assert all(
            low <= high for lower, upper in itertools.pairwise(found) for low, high in zip(lower, upper, strict=True)
        )
        assert [spent(n_open) for n_open in found] == pytest.approx(budgets, abs=HALF_STEP)
        assert found[0] == [0] * len(SIZES)
        assert found[-1] == [3] * len(SIZES)

    def test_an_input_whose_slices_do_nothing_or_harm_opens_last(self, kind: Any) -> None:
        gains = falling_gains()
        gains[0], gains[1] = 0.0, -0.1
        (found,) = depths_at(measured(kind, gains), [5.0])
        assert found[:2] == [0, 0]

    def test_between_stored_budgets_the_dial_opens_inputs_one_after_the_other(self, kind: Any) -> None:
        inputs = [RoutedInput(router, BITS, size) for router, size in zip(
            measured(kind, falling_gains()), SIZES, strict=True
        )]  # fmt: skip
        budgets = inputs[0].budgets.tolist()
        scores = [routed.router.scores(torch.randn(2, 4)) for routed in inputs]
        table = kind.thresholds_for(ThresholdTask(scores, SIZES, BITS, budgets))
        for routed, row in zip(inputs, table, strict=True):
            routed.set_tables(row.expand(len(BITS), -1), row.expand(len(BITS), -1))
        dial, used = Dial(inputs), []
        for bits in torch.linspace(2, 6, 81).tolist():
            dial.set_bits(bits)
            with record_gates(inputs) as records:
                for routed in inputs:
                    routed.gates(torch.randn(1, 4))
            used.append(sum(float(r[0].mean()) * n for r, n in zip(records, SIZES, strict=True)) / sum(SIZES))
        assert used == sorted(used)
        assert [used[n] for n in range(0, 81, 5)] == pytest.approx(budgets[::2], abs=HALF_STEP)
        assert (
            max(high - low for low, high in itertools.pairwise(used)) < 0.55
        )  # one quarter bit at a time, not all at once

    def test_a_model_that_holds_fewer_slices_meets_its_budgets_with_them(self, kind: Any) -> None:
        scores = [router.scores(torch.randn(2, 4))[:, :1] for router in measured(kind, falling_gains())]
        table = kind.thresholds_for(ThresholdTask(scores, SIZES, BITS[:2], [2.0, 2.5, 3.0]))
        opened = [[int((s[0] > t[c]).sum()) for s, t in zip(scores, table, strict=True)] for c in range(3)]
        assert [spent(n_open) for n_open in opened] == pytest.approx([2.0, 2.5, 3.0], abs=0.02)
        none = [router.scores(torch.randn(2, 4))[:, :0] for router in measured(kind, falling_gains())]
        assert kind.thresholds_for(ThresholdTask(none, SIZES, BITS[:1], [2.0])).shape == (len(SIZES), 1)


def test_learned_layers_start_alike_and_stay_bounded() -> None:
    router = LearnedLayerRouter(4, 5)
    assert router.scores(torch.randn(2, 4)).tolist() == [pytest.approx([0.5, 0.5 / 3, -0.5 / 3, -0.5])] * 2
    with torch.no_grad():
        router.raw.fill_(50.0)
    assert bool((router.scores(torch.randn(2, 4)).abs() <= 1).all())
    with pytest.raises(ValueError, match="first"):
        LearnedLayerRouter(4, 5, first=1.0)


def test_tokens_with_equal_scores_open_together_whichever_way_is_nearer() -> None:
    scores = torch.tensor([[0.5], [0.5], [0.5], [0.1]])
    thresholds = threshold_for_budget(scores, (2, 2), [2.5, 3.0, 3.4, 3.9])
    opened = [int((scores > t).sum()) for t in thresholds]
    assert opened == [0, 3, 3, 4]


class TestControls:
    def test_shuffled_tokens_spend_on_each_input_what_the_router_did(self) -> None:
        wanted = [2.0, 2.3, 3.7, 6.0]
        thresholds = control_thresholds("shuffled", SIZES[:4], BITS, wanted)
        for position, (bits, threshold) in enumerate(zip(wanted, thresholds, strict=True)):
            routed = RoutedInput(MLPRouter(4, len(BITS)), BITS, SIZES[position])
            control = control_router("shuffled", routed, 1, threshold)
            control.place(position, 4)
            with routed_by([routed], [control]):
                used = routed.bits_of(routed.gates(torch.randn(20_000, 4)))
            assert float(used.mean()) == pytest.approx(bits, abs=0.02)
            assert len(used.unique()) == (1 if bits in (2.0, 6.0) else 2)

    def test_best_layers_spend_the_mean_that_the_router_did_where_the_next_slice_gains_most(self) -> None:
        gains, wanted = falling_gains(), [2.0, 3.0, 3.0, 2.5] * 2
        mean = sum(bits * size for bits, size in zip(wanted, SIZES, strict=True)) / sum(SIZES)
        thresholds = control_thresholds("layers", SIZES, BITS, wanted, gains=gains)
        n_open = [round(0.5 - float(t)) for t in thresholds]
        assert 2 < mean < 3, "the two depths that are mixed"
        next_slice = torch.tensor([[depth in (2, 3) for depth in depths_of(BITS)]] * len(SIZES))
        assert n_open == best_depths(worth_of(gains), SIZES, BITS, mean, next_slice)
        assert spent(n_open) == pytest.approx(mean, abs=0.02)

    def test_at_a_depth_of_the_slices_best_layers_read_that_depth(self) -> None:
        for n_open, depth in enumerate(depths_of(BITS)):
            thresholds = control_thresholds("layers", SIZES, BITS, [float(depth)] * len(SIZES), gains=falling_gains())
            assert [round(0.5 - float(t)) for t in thresholds] == [n_open] * len(SIZES)
