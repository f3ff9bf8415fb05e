"""The contract of every strategy, run on every class that is found under strategies/."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from typing import Any

import pytest
import torch

from mobiq_lightning import strategies
from mobiq_lightning.codes import CODES
from mobiq_lightning.errors import RecipeError
from mobiq_lightning.packing import WHOLE_ROW, PackedWeight
from mobiq_lightning.strategies.base import BudgetSchedule, Objective, Router, SliceScheme
from mobiq_lightning.strategies.budgets.between import BetweenBudgets
from mobiq_lightning.strategies.thresholds import average_bits, prefix_scores, threshold_for_budget

SLICE_BITS = [(2, 2, 2, 2), (2, 1, 1, 1, 1, 1, 1), (4, 2, 2), (1, 1, 1)]


for module in pkgutil.walk_packages(strategies.__path__, f"{strategies.__name__}."):
    importlib.import_module(module.name)  # so that a class is found in whatever file it lies, exported or not


def subclasses(base: type) -> list[type]:
    """All concrete classes under strategies/ below a base."""
    found = [c for sub in base.__subclasses__() for c in (sub, *subclasses(sub))]
    own = [c for c in found if c.__module__.startswith("mobiq_lightning.strategies")]
    return [c for c in dict.fromkeys(own) if not c.__abstractmethods__]  # type: ignore[attr-defined]


def test_every_strategy_is_exported_from_the_package() -> None:
    names = {c.__name__ for base in (SliceScheme, Router, BudgetSchedule, Objective) for c in subclasses(base)}
    bases = {"BlockRun", "SliceScheme", "Router", "BudgetSchedule", "Objective"}
    assert names == set(strategies.__all__) - bases


@pytest.mark.parametrize("slice_bits", SLICE_BITS)
@pytest.mark.parametrize("kind", subclasses(SliceScheme))
class TestSliceSchemes:
    def scheme(self, kind: Any, slice_bits: tuple[int, ...], group_size: int = 64) -> tuple[Any, torch.Tensor]:
        torch.manual_seed(0)
        scheme = kind(12, 172, slice_bits=slice_bits, group_size=group_size)  # 172 is no multiple of 64
        for parameter in scheme.parameters():
            torch.nn.init.uniform_(parameter, -0.3, 0.3)
        return scheme, torch.randn(12, 172)

    def test_slices_add_up_to_the_weight_at_every_depth(self, kind: Any, slice_bits: tuple[int, ...]) -> None:
        scheme, weight = self.scheme(kind, slice_bits)
        slices = scheme(weight)
        assert slices.shape == (len(slice_bits), 12, 172)
        for k in range(1, len(slice_bits) + 1):
            torch.testing.assert_close(slices[:k].sum(0), scheme.weight_at(weight, k), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("group_size", [64, WHOLE_ROW])
    def test_what_is_packed_is_what_was_trained_bit_by_bit(
        self, kind: Any, slice_bits: tuple[int, ...], group_size: int
    ) -> None:
        scheme, weight = self.scheme(kind, slice_bits, group_size)
        packed: PackedWeight = scheme.pack(weight)
        assert type(packed) is CODES[scheme.code]
        for name, value in packed.named_values.items():
            shapes = packed.value_shapes(12, 172, group_size, slice_bits)
            assert (value.dtype, tuple(value.shape)) == (torch.bfloat16, shapes[name])
        for k, depth in enumerate(scheme.depths, start=1):
            assert torch.equal(packed.weight_at(depth), scheme.weight_at(weight, k))
            assert torch.equal(packed.weight_at(depth), scheme.prefixes(weight)[k - 1])

    def test_every_slice_lowers_the_error(self, kind: Any, slice_bits: tuple[int, ...]) -> None:
        scheme = kind(12, 172, slice_bits=slice_bits)
        weight = torch.randn(12, 172)
        errors = [(scheme.weight_at(weight, k + 1) - weight).norm().item() for k in range(len(slice_bits))]
        assert errors == sorted(errors, reverse=True)
        added = sum(slice_bits) - slice_bits[0]
        # Half per bit where cells are cut in two; planes that are added one by one to frozen ones reach less far.
        bound = 0.85**added if kind is strategies.BinaryCodedSlices else 2 * 0.5**added
        assert errors[-1] < errors[0] * bound

    def test_gradients_reach_every_parameter(self, kind: Any, slice_bits: tuple[int, ...]) -> None:
        scheme, weight = self.scheme(kind, slice_bits)
        weight.requires_grad_()
        (scheme(weight) * torch.randn(len(slice_bits), 12, 172)).sum().backward()
        assert all(bool((p.grad != 0).any()) for p in scheme.parameters())
        assert bool((weight.grad != 0).any())

    def test_the_state_dict_restores_the_scheme(self, kind: Any, slice_bits: tuple[int, ...]) -> None:
        scheme, weight = self.scheme(kind, slice_bits)
        before = scheme(weight)
        other = kind(12, 172, slice_bits=slice_bits, group_size=64)
        other.load_state_dict(scheme.state_dict())
        assert torch.equal(other(weight.clone()), before)
        scheme.forget()
        for again in (scheme, copy.deepcopy(scheme), pickle.loads(pickle.dumps(scheme))):
            assert torch.equal(again(weight), before)

    def test_another_weight_is_read_as_itself(self, kind: Any, slice_bits: tuple[int, ...]) -> None:
        scheme, weight = self.scheme(kind, slice_bits)
        scheme(weight)
        fresh = self.scheme(kind, slice_bits)[0](-2 * weight)
        with torch.no_grad():
            assert torch.equal(scheme(-2 * weight), fresh)
            weight.mul_(-2)
            assert torch.equal(scheme(weight), fresh)

    @pytest.mark.parametrize("weight", [torch.zeros(12, 20), torch.full((12, 20), 0.3), torch.full((12, 20), -1e-20)])
    def test_groups_without_spread_stay_what_they_are(
        self, kind: Any, slice_bits: tuple[int, ...], weight: torch.Tensor
    ) -> None:
        read = kind(12, 20, slice_bits=slice_bits).pack(weight).weight_at(sum(slice_bits))
        torch.testing.assert_close(read, weight, rtol=2**-7, atol=1e-18)


def test_residual_slices_have_the_gradient_that_autograd_gives_straight_through() -> None:
    torch.manual_seed(1)
    scheme = strategies.ResidualSlices(6, 20, slice_bits=(2, 1, 1), group_size=8)
    for parameter in scheme.parameters():
        torch.nn.init.uniform_(parameter, -1, 0.5)
    weight, upstream = torch.randn(6, 20), torch.randn(3, 6, 20)
    (scheme.prefixes(weight) * upstream).sum().backward()

    def expand(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(8, dim=1)[:, :20]

    reference = copy.deepcopy(scheme)
    reference.zero_grad()
    scale, bias = reference._range(weight)
    total = torch.zeros(())
    for grad, depth in zip(upstream, scheme.depths, strict=True):
        position = ((weight - expand(bias)) / expand(scale) + 0.5) * 2**depth
        inside = (position >= 0) & (position < 2**depth)
        through = position + (position.floor() - position).detach()
        cell = torch.where(inside, through, position.floor().clamp(0, 2**depth - 1).detach())
        total = total + (grad * (expand(bias) + expand(scale) * ((cell + 0.5) * 2.0**-depth - 0.5))).sum()
    total.backward()
    for ours, theirs in zip(scheme.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", subclasses(SliceScheme))
@pytest.mark.parametrize("bad", [[], [0, 2], [4, 4, 2]])
def test_impossible_slice_bits_are_refused(kind: Any, bad: list[int]) -> None:
    with pytest.raises(ValueError, match="slice_bits"):
        kind(4, 8, slice_bits=bad)
    with pytest.raises(ValueError, match="group_size"):
        kind(4, 8, group_size=0)


@pytest.mark.parametrize("n_slices", [4, 7, 2])
@pytest.mark.parametrize("kind", subclasses(Router))
class TestRouters:
    def router(self, kind: Any, n_slices: int) -> Any:
        torch.manual_seed(0)
        router = kind(16, n_slices)
        router.place(1, 3)
        router.threshold.fill_(-0.7)
        slice_bits = (2,) + (1,) * (n_slices - 1)
        scheme, weight = strategies.ResidualSlices(24, 16, slice_bits, group_size=16), torch.randn(24, 16)
        router.observe_weights(weight, scheme.prefixes(weight).detach(), slice_bits)
        return router

    @pytest.mark.parametrize("shape", [(0, 16), (1, 16), (3, 5, 16)])
    def test_scores_and_gates_have_the_shape_of_the_tokens(
        self, kind: Any, n_slices: int, shape: tuple[int, ...]
    ) -> None:
        router = self.router(kind, n_slices)
        x = torch.randn(shape)
        assert router.scores(x).shape == (*shape[:-1], n_slices - 1)
        assert router(x).shape == (*shape[:-1], n_slices)

    def test_gates_are_hard_open_at_the_base_and_have_no_gaps(self, kind: Any, n_slices: int) -> None:
        gates = self.router(kind, n_slices).eval()(torch.randn(200, 16))
        assert set(gates.unique().tolist()) <= {0.0, 1.0}
        assert bool((gates[:, 0] == 1).all())
        assert bool((gates.diff(dim=-1) <= 0).all())

    def test_training_gates_have_the_value_of_hard_ones_and_reach_every_parameter(
        self, kind: Any, n_slices: int
    ) -> None:
        router = self.router(kind, n_slices).train()
        x = torch.randn(200, 16)
        router.reseed(1)
        gates = router(x)
        router.reseed(1)
        torch.testing.assert_close(gates, router.eval()(x), atol=1e-6, rtol=0)
        if list(router.parameters()):
            (gates * torch.randn_like(gates)).sum().backward()
            assert all(bool((p.grad != 0).any()) for p in router.parameters())

    def test_the_same_key_gives_the_same_scores(self, kind: Any, n_slices: int) -> None:
        router, x = self.router(kind, n_slices), torch.randn(50, 16)
        router.reseed(5)
        first = router.scores(x)
        router.reseed(5)
        assert torch.equal(first, router.scores(x))

    def test_thresholds_meet_the_budget_over_all_inputs(self, kind: Any, n_slices: int) -> None:
        slice_bits = (2,) + (1,) * (n_slices - 1)
        sizes = [3000, 1000, 5400, 2700] * 4  # as of qkv, o, gate and up, down of four blocks
        routers = [self.router(kind, n_slices) for _ in sizes]
        for position, router in enumerate(routers):
            router.place(position, len(sizes))
        scores = [prefix_scores(router.scores(torch.randn(4000, 16))) for router in routers]
        budgets = [2.0, 2.3, sum(slice_bits) - 0.5, float(sum(slice_bits))]
        for scope in ("layer", "global"):
            table = kind.thresholds_for(scores, sizes, slice_bits, budgets, scope)
            assert table.shape == (len(sizes), len(budgets))
            for column, budget in enumerate(budgets):
                spent = [float(average_bits(s, slice_bits, t)) for s, t in zip(scores, table[:, column], strict=True)]
                mean = sum(b * n for b, n in zip(spent, sizes, strict=True)) / sum(sizes)
                assert mean == pytest.approx(budget, abs=0.02)

    def test_the_state_dict_restores_the_router(self, kind: Any, n_slices: int) -> None:
        router, other = self.router(kind, n_slices), kind(16, n_slices)
        other.load_state_dict(router.state_dict())
        for one in (router, other):  # what a router keeps of the weights is restored with it
            one.place(1, 3)
            one.reseed(3)
        x = torch.randn(5, 16)
        assert torch.equal(router.scores(x), other.scores(x))


def test_the_mlp_router_sees_the_norm_of_a_token_but_not_only_that() -> None:
    torch.manual_seed(0)
    router = strategies.MLPRouter(16, 4)
    x = torch.randn(5, 16)
    assert not torch.allclose(router.scores(x), router.scores(3 * x), atol=1e-4)
    assert not torch.allclose(router.scores(x), router.scores(x.flip(-1)), atol=1e-4)


def shown(router: Any, weight: torch.Tensor, slice_bits: tuple[int, ...] = (2, 1, 1)) -> tuple[Any, torch.Tensor]:
    """A router that has seen a weight, and the errors (S, O, I) of its slices."""
    prefixes = (
        strategies.ResidualSlices(*weight.shape, slice_bits, group_size=weight.shape[1]).prefixes(weight).detach()
    )
    router.observe_weights(weight, prefixes, slice_bits)
    return router, weight - prefixes


def squared_gain(errors: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Squared error (N, S - 1) that each slice after the first takes from the product, in float64."""
    squared = torch.einsum("soi,ni->nso", errors.double(), x.double()).square().sum(-1)
    return squared[:, :-1] - squared[:, 1:]


def test_the_oracle_scores_by_the_exact_error_that_a_slice_takes_away_per_bit() -> None:
    torch.manual_seed(0)
    oracle, errors = shown(strategies.OracleRouter(16, 3), torch.randn(24, 16), (2, 1, 2))
    x = torch.randn(50, 16)
    gains = squared_gain(errors, x) / torch.tensor([1.0, 2.0])
    positive = gains > 1e-3
    torch.testing.assert_close(oracle.scores(x)[positive], gains.log().float()[positive], atol=1e-3, rtol=1e-3)


def test_a_sketch_ranks_tokens_nearly_as_the_oracle_does_and_better_with_more_projections() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 32), torch.randn(400, 32) * torch.rand(400, 1)

    def correlation(n_projections: int) -> float:
        sketch, errors = shown(strategies.ErrorSketchRouter(32, 3, n_projections), weight)
        ranks = [v.argsort().argsort().double() for v in (sketch.scores(x)[:, 0], squared_gain(errors, x)[:, 0])]
        return float(torch.corrcoef(torch.stack(ranks))[0, 1])

    few, many = correlation(4), correlation(256)
    assert 0.5 < few < many
    assert many > 0.97


def test_a_sketch_draws_other_rows_for_every_input_and_the_same_again() -> None:
    weight = torch.randn(8, 16)
    routers = [strategies.ErrorSketchRouter(16, 3) for _ in range(3)]
    for position, router in zip((0, 1, 0), routers, strict=True):
        router.place(position, 2)
        shown(router, weight)
    assert torch.equal(routers[0].factors, routers[2].factors)
    assert not torch.equal(routers[0].factors, routers[1].factors)


def test_an_oracle_for_a_wide_input_is_refused_with_what_it_would_need() -> None:
    with pytest.raises(RecipeError, match=r"would store 13\.2 GB for one input of 28672 features"):
        strategies.OracleRouter(28672, 4)


def test_the_norm_router_opens_a_slice_more_for_a_token_of_twice_the_norm() -> None:
    router, x = strategies.NormRouter(16, 4), torch.randn(5, 16)
    torch.testing.assert_close(router.scores(2 * x)[:, 1:], router.scores(x)[:, :-1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="step"):
        strategies.NormRouter(16, 4, step=0.0)


def test_static_draws_take_other_layers_at_the_same_bits() -> None:
    sizes, slice_bits = [3000, 1000, 5400, 2700] * 4, (2, 1, 1)
    draws = [strategies.StaticRouter.allocate(sizes, slice_bits, 2.4, seed) for seed in range(4)]
    assert len({tuple(draw) for draw in draws}) == 4
    assert draws[0] == strategies.StaticRouter.allocate(sizes, slice_bits, 2.4)
    for draw in draws:
        spent = sum((2 + n) * size for n, size in zip(draw, sizes, strict=True)) / sum(sizes)
        assert spent == pytest.approx(2.4, abs=0.02)


def test_random_routers_leave_the_global_random_state_alone_and_differ_between_inputs() -> None:
    before = torch.get_rng_state()
    first, second = (strategies.RandomRouter(4, 3) for _ in range(2))
    first.place(0, 2)
    second.place(1, 2)
    x = torch.zeros(20, 4)
    assert not torch.equal(first.scores(x), second.scores(x))
    assert torch.equal(before, torch.get_rng_state())


BUDGETS = {
    "ConstantBudget": {"bits": 3.0},
    "SampledBudget": {"low_bits": 2.0, "high_bits": 5.0},
    "ListedBudget": {"points": [[0.0, 6.0], [0.2, 3.0], [0.2, 5.0], [0.9, 3.0]]},
    "default": {"start_bits": 6.0, "end_bits": 2.5},
}


@pytest.mark.parametrize("kind", subclasses(BudgetSchedule))
class TestBudgets:
    def schedule(self, kind: Any) -> Any:
        return kind(**BUDGETS.get(kind.__name__, BUDGETS["default"]))

    def test_budgets_stay_within_their_bounds(self, kind: Any) -> None:
        schedule = self.schedule(kind)
        low, high = schedule.bounds
        values = [schedule(i / 100) for i in range(101)]
        assert low <= min(values) <= max(values) <= high
        assert low <= schedule.final_bits <= high

    def test_the_budget_depends_on_the_progress_alone(self, kind: Any) -> None:
        first, second = self.schedule(kind), self.schedule(kind)
        forwards = [first(i / 10) for i in range(11)]
        backwards = [second(i / 10) for i in reversed(range(11))]
        assert forwards == backwards[::-1]

    @pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
    def test_progress_outside_of_the_block_is_refused(self, kind: Any, progress: float) -> None:
        with pytest.raises(ValueError, match="progress"):
            self.schedule(kind)(progress)

    def test_a_schedule_between_two_budgets_has_them_at_its_ends(self, kind: Any) -> None:
        if not issubclass(kind, BetweenBudgets):
            assert self.schedule(kind).final_bits in (3.0, 3.5)
            return
        schedule = self.schedule(kind)
        assert schedule(0.0) == pytest.approx(6.0)
        assert schedule(1.0) == pytest.approx(2.5)
        values = [schedule(i / 50) for i in range(51)]
        assert values == sorted(values, reverse=True)


def test_a_listed_budget_goes_in_straight_lines_and_stays_at_its_ends() -> None:
    schedule = strategies.ListedBudget([[0.2, 6.0], [0.4, 4.0], [0.4, 5.0], [0.8, 3.0]])  # type: ignore[list-item]
    expected = {0.0: 6.0, 0.2: 6.0, 0.3: 5.0, 0.4: 5.0, 0.6: 4.0, 0.8: 3.0, 1.0: 3.0}
    assert {progress: schedule(progress) for progress in expected} == pytest.approx(expected)


@pytest.mark.parametrize("points", [[], [[0.5, 3], [0.2, 4]], [[-0.1, 3]], [[0.0, 3], [1.5, 3]]])
def test_a_listed_budget_that_goes_back_or_beyond_is_refused(points: list[Any]) -> None:
    with pytest.raises(ValueError, match="points"):
        strategies.ListedBudget(points)


def test_sampled_budgets_cover_their_interval() -> None:
    draws = [strategies.SampledBudget(2.0, 6.0)(i / 999) for i in range(1000)]
    assert sum(draws) / 1000 == pytest.approx(4.0, abs=0.1)
    assert min(draws) < 2.1
    assert max(draws) > 5.9


def test_a_threshold_opens_the_best_scores_first_and_as_many_as_the_budget_allows() -> None:
    scores = torch.tensor([[0.9], [0.1], [0.5], [0.3]])
    thresholds = threshold_for_budget(scores, (2, 2), [2.0, 2.5, 3.0, 4.0])
    opened = [(scores > t).flatten().tolist() for t in thresholds]
    assert opened == [[False] * 4, [True, False, False, False], [True, False, True, False], [True] * 4]


def test_heavier_tokens_count_more_in_a_pooled_threshold() -> None:
    scores = torch.tensor([[0.9], [0.1]])
    threshold = threshold_for_budget(scores, (2, 2), [3.5], weights=torch.tensor([3.0, 1.0]))
    assert (scores > threshold).flatten().tolist() == [True, False]


class FakeRun:
    """A block whose outputs are known."""

    target = torch.ones(2, 3, 4)

    def at_depth(self, bits: int) -> torch.Tensor:
        return self.target + 2.0**-bits

    def routed(self, target_bits: float, meet_exactly: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return self.target + 0.5, torch.tensor(target_bits if meet_exactly else target_bits + 1.0)

    def auxiliary_target(self, bits: int) -> torch.Tensor:
        return self.target


@pytest.mark.parametrize("kind", subclasses(Objective))
def test_an_objective_has_a_loss_and_reads_the_depths_that_it_names(kind: Any) -> None:
    objective = kind()
    terms = objective(FakeRun(), 3.0, True)
    assert terms["loss"].ndim == 0
    assert objective.depths == tuple(sorted(objective.depths))


def test_block_reconstruction_weighs_depths_and_charges_for_missing_the_budget() -> None:
    run = FakeRun()
    plain = strategies.BlockReconstruction({2: 1.0, 4: 0.5}, routed_weight=0.0)
    assert float(plain(run, 3.0, False)["loss"]) == pytest.approx(2.0**-4 + 0.5 * 2.0**-8)
    penalty = strategies.BlockReconstruction({2: 1.0}, routed_weight=0.0, budget_rule="penalty", penalty_weight=2.0)
    assert float(penalty(run, 3.0, True)["loss"]) == pytest.approx(2.0**-4 + 2.0)
    auxiliary = strategies.BlockReconstruction({2: 1.0}, routed_weight=0.0, auxiliary_weight=1.0)
    assert float(auxiliary(run, 3.0, False)["loss"]) == pytest.approx(2 * 2.0**-4)
