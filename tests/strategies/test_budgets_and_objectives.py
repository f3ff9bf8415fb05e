"""The contract of budget schedules and objectives, run on every class that is found under strategies/."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mobiq_lightning import strategies
from mobiq_lightning.strategies.base import BudgetSchedule, Objective
from mobiq_lightning.strategies.budgets.between import BetweenBudgets
from tests.strategies.kinds import subclasses

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


@pytest.mark.parametrize("points", [[], [[0.5, 3], [0.2, 4]], [[-0.1, 3]], [[0.0, 3], [1.5, 3]], [[0.0, float("nan")]]])
def test_a_listed_budget_that_goes_back_or_beyond_is_refused(points: list[Any]) -> None:
    with pytest.raises(ValueError, match="points"):
        strategies.ListedBudget(points)


def test_sampled_budgets_cover_their_interval() -> None:
    draws = [strategies.SampledBudget(2.0, 6.0)(i / 999) for i in range(1000)]
    assert sum(draws) / 1000 == pytest.approx(4.0, abs=0.1)
    assert min(draws) < 2.1
    assert max(draws) > 5.9


class FakeRun:
    """A block whose outputs are known. Its errors at fixed depths and routed grow with one parameter each."""

    target = torch.ones(2, 3, 4)
    uneven = torch.tensor([1.0, -1.0, 1.0, -1.0])  # logits that all grow by as much give the same distribution

    def __init__(self, depths: dict[int, float] | None = None) -> None:
        self.depths = depths
        self.input_ids = torch.tensor([[0, 2, 0], [2, 0, 2]])
        self.fixed = torch.ones((), requires_grad=True)
        self.routing = torch.ones((), requires_grad=True)
        self.depths_read: set[int] = set()

    def at_depth(self, bits: int) -> torch.Tensor:
        self.depths_read.add(bits)
        return self.target + self.fixed * 2.0**-bits * self.uneven

    def routed(self, target_bits: float, meet_exactly: bool) -> tuple[torch.Tensor, torch.Tensor]:
        bits = torch.tensor(target_bits if meet_exactly else target_bits + 1.0)
        return self.target + self.routing * 0.5 * self.uneven, bits

    def auxiliary_target(self, bits: int) -> torch.Tensor:
        return self.target


@pytest.mark.parametrize("kind", subclasses(Objective))
class TestObjectives:
    def objective(self, kind: Any) -> Any:
        return kind(depth_weights={2: 1.0, 4: 0.3, 8: 0.1})

    @pytest.mark.parametrize("train_routers", [False, True])
    def test_its_terms_are_finite_scalars_and_its_loss_falls_with_the_errors(
        self, kind: Any, train_routers: bool
    ) -> None:
        run = FakeRun()
        terms = self.objective(kind)(run, 3.0, train_routers)
        assert all(value.ndim == 0 and bool(torch.isfinite(value)) for value in terms.values())
        terms["loss"].backward()
        assert run.fixed.grad is not None
        assert float(run.fixed.grad) > 0
        routed = 0.0 if run.routing.grad is None else float(run.routing.grad)
        assert (routed > 0) == train_routers  # a stage without routers must not pay for routing

    def test_it_reads_exactly_the_depths_that_it_names(self, kind: Any) -> None:
        run, objective = FakeRun(), self.objective(kind)
        objective(run, 3.0, True)
        assert run.depths_read == set(objective.depths)
        assert objective.depths == tuple(sorted(objective.depths))

    def test_of_a_stage_with_one_depth_it_reads_that_alone(self, kind: Any) -> None:
        run = FakeRun(depths={3: 2.0})
        terms = self.objective(kind)(run, 3.0, False)
        assert run.depths_read == {3}
        assert terms["loss"].item() > 0


def test_block_reconstruction_weighs_depths_and_charges_for_missing_the_budget() -> None:
    run = FakeRun()
    plain = strategies.BlockReconstruction({2: 1.0, 4: 0.5}, routed_weight=0.0)
    assert plain(run, 3.0, False)["loss"].item() == pytest.approx(2.0**-4 + 0.5 * 2.0**-8)
    penalty = strategies.BlockReconstruction({2: 1.0}, routed_weight=0.0, budget_rule="penalty", penalty_weight=2.0)
    assert penalty(run, 3.0, True)["loss"].item() == pytest.approx(2.0**-4 + 2.0)
    auxiliary = strategies.BlockReconstruction({2: 1.0}, routed_weight=0.0, auxiliary_weight=1.0)
    assert auxiliary(run, 3.0, False)["loss"].item() == pytest.approx(2 * 2.0**-4)


def test_the_text_itself_counts_as_much_as_asked() -> None:
    run = FakeRun(depths={2: 1.0})
    plain = strategies.LogitDistillation()(run, 3.0, False)["loss"]
    mixed = strategies.LogitDistillation(label_weight=0.25)(run, 3.0, False)["loss"]
    log_probs = torch.log_softmax(run.at_depth(2), -1)[0, 0]  # every token's logits are the same here
    nll = -log_probs[0]  # tokens 0 and 2 are as likely
    torch.testing.assert_close(mixed, 0.75 * plain + 0.25 * nll)
    assert float(nll.detach()) > float(plain.detach())
