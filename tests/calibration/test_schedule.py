"""The epochs of a fit: who is trained when, and what a recipe may ask for."""

from __future__ import annotations

import pytest

from mobiq_lightning.calibration.schedule import Schedule, Stage, stage_problems

DEPTHS = (2, 3, 4, 6, 8)


def places(schedule: Schedule) -> list[tuple[int, int | None]]:
    """Stage and block of every epoch."""
    return [(schedule.at(epoch).number, schedule.at(epoch).block) for epoch in range(schedule.n_epochs)]


def test_shares_of_a_block_follow_each_other_block_by_block() -> None:
    schedule = Schedule([Stage(share=0.33, train=["ranges"]), Stage(share=0.67, train=["ranges", "routers"])], 6, 2)
    assert places(schedule) == [(0, 0)] * 2 + [(1, 0)] * 4 + [(0, 1)] * 2 + [(1, 1)] * 4
    assert all(schedule.at(epoch).span == range(6) for epoch in range(6))
    assert [epoch for epoch in range(12) if schedule.ends_visit(epoch)] == [5, 11]


def test_a_stage_of_the_model_ends_the_sweep_before_it() -> None:
    stages = [
        Stage(train=["codes", "ranges"], epochs=2, depth=2),
        Stage(train=["codes"], epochs=1, depth=3),
        Stage(train=["codes"], epochs=2, depth=3, scope="model"),
        Stage(train=["codes"], epochs=1, depth=4),
        Stage(train=["routers"], epochs=1, scope="model"),
        Stage(train=["routers"], epochs=1, scope="model"),
    ]
    schedule = Schedule(stages, 0, 2)
    first = [(0, 0), (0, 0), (1, 0), (0, 1), (0, 1), (1, 1)]
    assert places(schedule) == [*first, (2, None), (2, None), (3, 0), (3, 1), (4, None), (5, None)]
    assert [epoch for epoch in range(schedule.n_epochs) if schedule.ends_visit(epoch)] == [2, 5, 7, 8, 9, 10, 11]
    assert schedule.at(0).span == range(2)


def test_a_block_is_written_when_nothing_that_it_stores_changes_any_more() -> None:
    by_block = Schedule([Stage(share=1.0, train=["ranges", "routers"])], 3, 2)
    assert [by_block.final_epoch(block) for block in range(2)] == [2, 5]
    stages = [Stage(train=["codes"], epochs=2, depth=2), Stage(train=["codes"], epochs=1, depth=2, scope="model")]
    finished = Schedule([*stages, Stage(train=["routers"], epochs=5, scope="model")], 0, 2)
    assert [finished.final_epoch(block) for block in range(2)] == [4, 4]


def test_codes_are_in_training_until_no_later_stage_moves_them() -> None:
    stages = [Stage(train=["codes"], epochs=1, depth=2), Stage(train=["codes"], epochs=1, depth=2, scope="model")]
    schedule = Schedule([*stages, Stage(train=["ranges", "routers"], epochs=1, scope="model")], 0, 2)
    assert [schedule.trains_codes_after(schedule.at(epoch)) for epoch in range(4)] == [True, True, False, False]
    by_block = Schedule([stages[1], Stage(train=["codes"], epochs=1, depth=3)], 0, 2)
    assert [by_block.trains_codes_after(by_block.at(epoch)) for epoch in range(3)] == [True, False, False], (
        "what blocks train one after the other after a stage of the whole model"
    )


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([], "there is none"),
        ([Stage(share=0.5, train=["ranges"])], "must be above 0 and add up to 1"),
        (
            [Stage(share=0.5, train=["ranges"]), Stage(train=["ranges"], epochs=2)],
            "all a share, or all a number of epochs",
        ),
        ([Stage(share=1.0, train=[])], "train names nothing"),
        ([Stage(train=["ranges"])], "epochs (None) must be at least 1"),
        ([Stage(share=1.0, train=["ranges"], epochs=2)], "give share (1) or epochs (2), not both"),
        ([Stage(share=1.0, train=["routers"], scope="model")], "scope model takes epochs"),
        ([Stage(train=["codes"], epochs=1, depth=5)], "depth 5 is no prefix of the slices"),
        ([Stage(train=["codes"], epochs=1)], "takes a depth"),
        (
            [Stage(train=["routers"], bounds=["rounding"], epochs=1)],
            "bounds rounding of codes, which it does not train",
        ),
        (
            [Stage(train=["codes"], bounds=["clipping"], epochs=1, depth=2)],
            "bounds clipping of ranges, which it does not",
        ),
        ([Stage(train=["ranges"], epochs=1, lr_scale=0.0)], "lr_scale (0) must be above 0"),
        ([Stage(train=["codes"], epochs=1, depth=4, scope="model", mixed=1.5)], "mixed (1.5) is a part of the steps"),
        ([Stage(train=["codes"], epochs=1, depth=4, mixed=0.5)], "mixed (0.5) takes scope: model"),
        ([Stage(train=["routers"], epochs=1, depth=4, scope="model", mixed=0.5)], "reads as they decide"),
        ([Stage(train=["codes"], epochs=1, depth=4, mixed=None)], "mixed: null is no value"),  # type: ignore[arg-type]
        ([Stage(train=None, epochs=1, lr_scale=None)], "train, lr_scale: null is no value"),  # type: ignore[arg-type]
        ([Stage(train=["codes"], epochs=1, depth=2, scope="model", mixed=0.5)], "a depth above 2"),
        ([Stage(train=["codes"], epochs=1, depth=4, other_depths={5: 1.0})], "beside depth (4)"),
        ([Stage(train=["routers"], epochs=1, other_depths={8: 1.0})], "beside depth (None)"),
        (
            [Stage(train=["codes"], epochs=1, depth=4), Stage(train=["codes"], bounds=["rounding"], epochs=1, depth=3)],
            "depth 3 comes after depth 4",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused_with_the_values(stages: list[Stage], said: str) -> None:
    problems = list(stage_problems(stages, DEPTHS, learns_codes=True, epochs_per_block=6))
    assert len(problems) == 1
    assert said in problems[0]


def test_the_loss_of_a_stage_has_its_depth_and_finer_ones_and_none_for_routers_alone() -> None:
    assert Stage(train=["codes"], epochs=1, depth=2, other_depths={8: 0.5}).depths == {2: 1.0, 8: 0.5}
    assert Stage(train=["routers"], epochs=1).depths == {}
    assert Stage(share=1.0, train=["ranges", "routers"]).depths is None


def test_codes_are_refused_for_schemes_that_have_none_to_train() -> None:
    problems = list(
        stage_problems([Stage(train=["codes"], epochs=1, depth=2)], DEPTHS, learns_codes=False, epochs_per_block=6)
    )
    assert "use ProgressiveSlices" in problems[0]


def test_visits_are_counted_as_epochs_end_them() -> None:
    block, model = Stage(train=["codes"], depth=2, epochs=2), Stage(train=["routers"], epochs=1, scope="model")
    schedule = Schedule([block, model], 6, n_blocks=2)
    assert [schedule.visits_until(epoch) for epoch in range(-1, 5)] == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("shares", [(1 / 3, 2 / 3), (0.25, 0.75), (0.05, 0.05, 0.9), (1.0,)])
def test_a_stage_whose_share_is_no_epoch_is_refused_with_the_epochs_that_are_enough(shares: tuple[float, ...]) -> None:
    stages = [Stage(share=share, train=["ranges", "routers"]) for share in shares]
    said = list(stage_problems(stages, DEPTHS, learns_codes=True, epochs_per_block=1))
    assert len(said) == len(shares) - 1  # one stage has the one epoch
    for problem in said:
        assert "of model.epochs_per_block (1) is no epoch, so that it would train nothing; with " in problem
        enough = int(problem.partition("; with ")[2].split()[0])
        assert not list(stage_problems(stages, DEPTHS, learns_codes=True, epochs_per_block=enough))
