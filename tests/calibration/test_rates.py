"""Learning rates over the steps of a stage."""

from __future__ import annotations

import math

import pytest

from mobiq_lightning.calibration.rates import Rates


def test_rates_fall_along_half_a_cosine_where_nothing_is_said_of_a_warm_up() -> None:
    steps = 9
    shares = [Rates().share(step / (steps - 1), steps) for step in range(steps)]
    assert shares == pytest.approx([(1 + math.cos(math.pi * step / (steps - 1))) / 2 for step in range(steps)])
    assert shares[0] == 1


def test_in_a_warm_up_they_rise_step_by_step_and_then_are_what_they_were() -> None:
    rates, steps = Rates(warmup=0.25), 16
    shares = [rates.share(step / (steps - 1), steps) for step in range(steps)]
    usual = [Rates().share(step / (steps - 1), steps) for step in range(steps)]
    assert [share / full for share, full in zip(shares[:4], usual[:4], strict=True)] == pytest.approx(
        [0.25, 0.5, 0.75, 1]
    )
    assert shares[4:] == usual[4:]


def test_a_stage_of_a_step_or_two_is_not_all_warm_up() -> None:
    assert [Rates(warmup=0.5).share(position, 2) for position in (0.0, 1.0)] == [1.0, 0.0]


@pytest.mark.parametrize("part", [-0.1, 1.1, math.nan])
def test_a_warm_up_is_a_part_of_the_steps(part: float) -> None:
    with pytest.raises(ValueError, match=r"model\.rates\.warmup"):
        Rates(warmup=part)
