"""The contract of routers, run on every class that is found under strategies/, and what each of ours does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mobiq_lightning import strategies
from mobiq_lightning.errors import RecipeError
from mobiq_lightning.strategies import ObservesGains, ObservesWeights, ThresholdTask
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.thresholds import average_bits, prefix_scores, threshold_for_budget
from tests.strategies.kinds import subclasses


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
        if isinstance(router, ObservesWeights):
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
            table = kind.thresholds_for(ThresholdTask(scores, sizes, slice_bits, budgets, scope))
            assert table.shape == (len(sizes), len(budgets))
            for column, budget in enumerate(budgets):
                spent = [float(average_bits(s, slice_bits, t)) for s, t in zip(scores, table[:, column], strict=True)]
                mean = sum(b * n for b, n in zip(spent, sizes, strict=True)) / sum(sizes)
                assert mean == pytest.approx(budget, abs=0.02)

    def test_the_state_dict_restores_the_router_as_transformers_loads_it(self, kind: Any, n_slices: int) -> None:
        router = self.router(kind, n_slices)
        with torch.device("meta"):
            other = kind(16, n_slices)
        other = other.to_empty(device="cpu")
        for value in (*other.parameters(), *other.buffers()):  # memory holds anything until it is loaded
            value.data.fill_(float("nan"))
        other.load_state_dict(router.state_dict())
        for one in (router, other):  # what a router keeps of the weights is restored with it
            one.place(1, 3)
            one.reseed(3)
        x = torch.randn(5, 16)
        assert torch.equal(router.scores(x), other.scores(x))

    def test_a_token_is_scored_by_itself_whatever_stands_beside_it(self, kind: Any, n_slices: int) -> None:
        router, x = self.router(kind, n_slices).eval(), torch.randn(30, 16)
        router.reseed(1)
        scores = router.scores(x)
        router.reseed(2)
        if not torch.equal(scores, router.scores(x)):
            return  # draws follow the order of the tokens
        alone = torch.cat([router.scores(token) for token in x.split(1)])
        torch.testing.assert_close(alone, scores, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(router.scores(x.flip(0)).flip(0), scores, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_tokens_in_half_precision_get_finite_scores_in_float32(
        self, kind: Any, n_slices: int, dtype: torch.dtype
    ) -> None:
        x = torch.randn(30, 16).to(dtype)
        x[0] = 0.0
        x[1] = 200.0  # its square is beyond float16
        before = x.clone()
        scores = self.router(kind, n_slices).scores(x)
        assert scores.dtype == torch.float32
        assert bool(torch.isfinite(scores).all())
        assert torch.equal(x, before)

    def test_the_weights_seen_last_are_all_that_counts_and_the_global_random_state_stays(
        self, kind: Any, n_slices: int
    ) -> None:
        router, other, x = self.router(kind, n_slices), self.router(kind, n_slices), torch.randn(5, 16)
        prefixes = torch.randn(n_slices, 24, 16)
        state = torch.get_rng_state()
        if isinstance(router, ObservesWeights):
            router.observe_weights(prefixes.sum(0), prefixes.flip(0), (2,) * n_slices)
            router.observe_weights(prefixes.sum(0), prefixes, (1,) * n_slices)
            other.observe_weights(prefixes.sum(0), prefixes, (1,) * n_slices)
        for one in (router, other):
            one.reseed(4)
        assert torch.equal(router.scores(x), other.scores(x))
        assert torch.equal(torch.get_rng_state(), state)


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


def test_a_threshold_opens_the_best_scores_first_and_as_many_as_the_budget_allows() -> None:
    scores = torch.tensor([[0.9], [0.1], [0.5], [0.3]])
    thresholds = threshold_for_budget(scores, (2, 2), [2.0, 2.5, 3.0, 4.0])
    opened = [(scores > t).flatten().tolist() for t in thresholds]
    assert opened == [[False] * 4, [True, False, False, False], [True, False, True, False], [True] * 4]


def test_heavier_tokens_count_more_in_a_pooled_threshold() -> None:
    scores = torch.tensor([[0.9], [0.1]])
    threshold = threshold_for_budget(scores, (2, 2), [3.5], weights=torch.tensor([3.0, 1.0]))
    assert (scores > threshold).flatten().tolist() == [True, False]


def test_routers_that_look_at_weights_or_gains_are_known_by_their_methods() -> None:
    looks = {kind.__name__: isinstance(kind(16, 3), ObservesWeights) for kind in subclasses(Router)}
    measured = {kind.__name__: isinstance(kind(16, 3), ObservesGains) for kind in subclasses(Router)}
    assert {name for name, found in looks.items() if found} == {"ErrorSketchRouter", "OracleRouter"}
    assert {name for name, found in measured.items() if found} == {"GradientLayerRouter", "ProbedLayerRouter"}
