"""What is left of a run, from what was expected of its phases and what was seen of them."""

from __future__ import annotations

import pytest

from mobiq_lightning.calibration.planning import FIXED, Phase, RunClock, TimeLeft


def a_run() -> TimeLeft:
    """Cheap steps on blocks, dear ones on the model, and a comparison: 10, 300 and 50 seconds expected."""
    return TimeLeft(
        [
            Phase("stage 1", "block", 100, 0.1),
            Phase("stage 2", "model", 100, 3.0),
            Phase("stage 3", "block", 50, 0.2),
            Phase("comparison", "comparison", 10, 5.0),
            Phase("latency check", FIXED, 1, 5.0),
        ]
    )


def test_before_anything_is_seen_it_is_what_was_expected() -> None:
    assert a_run().left() == pytest.approx(10 + 300 + 10 + 50 + 5)


def test_steps_count_by_what_they_cost_and_not_alike() -> None:
    left = a_run()
    left.note("stage 1", 100, 10.0)
    assert left.left() == pytest.approx(365)
    assert left.left() / left.total == pytest.approx(365 / 375)


def test_phases_of_a_kind_that_was_seen_go_at_its_pace_and_others_at_that_of_all() -> None:
    left = a_run()
    left.note("stage 1", 50, 10.0)  # twice as slow as expected
    assert left.left("stage 1") == pytest.approx(10)
    assert left.left("stage 3") == pytest.approx(20)
    assert left.left("stage 2") == pytest.approx(600)
    left.note("stage 2", 50, 150.0)  # the model is as fast as expected
    assert left.left("stage 2") == pytest.approx(150)
    assert left.left("stage 3") == pytest.approx(20)
    assert left.left("comparison") == pytest.approx(50 * 160 / 155)


def test_a_phase_that_takes_what_it_is_given_is_not_slowed_down() -> None:
    left = a_run()
    left.note("stage 1", 100, 1000.0)
    assert left.left("latency check") == 5.0


def test_what_a_resumed_run_has_done_before_is_neither_left_nor_timed() -> None:
    left = a_run()
    left.skip("stage 1", 100)
    left.skip("stage 2", 90)
    assert left.left() == pytest.approx(30 + 10 + 50 + 5)
    left.note("stage 2", 95, 30.0)  # five steps of six seconds
    assert left.left("stage 2") == pytest.approx(5 * 6)
    assert left.total == pytest.approx(left.left() + 30 + 90 * 6 + 10 * 2)


def test_a_phase_of_which_nothing_is_left_counts_no_more_however_many_steps_it_had() -> None:
    left = a_run()
    left.note("comparison", 2, 4.0)
    left.end("comparison")
    assert left.left("comparison") == 0


def test_the_same_work_in_other_steps_is_expected_to_take_the_same() -> None:
    left = a_run()
    left.note("comparison", 0, 0.0, of=1000)
    assert left.left("comparison") == pytest.approx(50)
    left.note("comparison", 100, 5.0, of=1000)
    assert left.left("comparison") == pytest.approx(45)


def test_a_phase_that_nobody_expected_counts_once_it_is_seen() -> None:
    left = a_run()
    left.note("another", 1, 2.0, of=3)
    assert left.left("another") == pytest.approx(4)


def test_the_clock_gives_each_step_the_time_since_the_one_before() -> None:
    times = iter([0.0, 10.0, 11.0, 13.0, 100.0, 101.0])
    clock = RunClock(a_run(), now=lambda: next(times))
    shown: list[tuple[str, int, int]] = []
    clock.show = lambda *step: shown.append(step)
    clock.restart()
    clock.step("stage 1", 1, 100)
    clock.step("stage 1", 2, 100)
    assert clock.left.left("stage 1") == pytest.approx(98 * 1.5)
    clock.restart()
    clock.step("stage 2", 1, 100)
    assert clock.left.left("stage 2") == pytest.approx(99)
    assert shown == [("stage 1", 1, 100), ("stage 1", 2, 100), ("stage 2", 1, 100)]
