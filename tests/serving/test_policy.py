"""From load to bits."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import mobiq_lightning
from mobiq_lightning import BitsPolicy
from mobiq_lightning.cli import main
from mobiq_lightning.errors import CheckpointError, RecipeError
from mobiq_lightning.serving import continue_prompt, measure_speed, store_speed
from mobiq_lightning.serving.policy import CurvePoint
from tests.conftest import Run

CURVE = [
    CurvePoint(2, 40.0, 200.0),
    CurvePoint(3, 28.0, 150.0),
    CurvePoint(4, 25.3, 100.0),
    CurvePoint(6, 24.6, 80.0),
    CurvePoint(8, 24.59, 60.0),  # no better than 6 bits
]


class TestLevels:
    def test_of_two_budgets_that_are_as_good_only_the_cheaper_is_a_level(self) -> None:
        assert [level.bits for level in BitsPolicy(CURVE).levels] == [6, 4, 3, 2]

    def test_a_budget_that_is_worse_than_a_cheaper_one_is_no_level(self) -> None:
        curve = [CurvePoint(2, 40.0), CurvePoint(2.5, 41.0), CurvePoint(4, 25.0)]
        assert [level.bits for level in BitsPolicy(curve).levels] == [4, 2]

    def test_a_budget_that_is_no_faster_than_one_with_more_bits_is_no_level(self) -> None:
        curve = [
            CurvePoint(2, 40.0, 100.0),
            CurvePoint(3, 28.0, 101.0),
            CurvePoint(4, 25.0, 80.0),
            CurvePoint(8, 24.0, 79.9),
        ]
        policy = BitsPolicy(curve)
        assert [level.bits for level in policy.levels] == [8, 3]
        assert policy.no_faster == [4, 2]
        assert [policy.bits_for_queue(queue) for queue in (0, 1000)] == [8, 3]

    def test_where_no_budget_is_faster_the_best_serves_every_load(self) -> None:
        flat = BitsPolicy([CurvePoint(point.bits, point.perplexity, 100.0) for point in CURVE])
        assert [flat.bits_for_queue(queue) for queue in (0, 8, 1000)] == [6, 6, 6]
        assert flat.no_faster == [4, 3, 2]

    def test_without_all_speeds_none_decides(self) -> None:
        curve = [CurvePoint(2, 40.0, 100.0), CurvePoint(3, 28.0, 100.0), CurvePoint(4, 25.0)]
        assert [level.bits for level in BitsPolicy(curve).levels] == [4, 3, 2]

    def test_quality_has_a_floor(self) -> None:
        assert [level.bits for level in BitsPolicy(CURVE, max_perplexity_ratio=1.2).levels] == [6, 4, 3]

    def test_bits_have_bounds(self) -> None:
        assert [level.bits for level in BitsPolicy(CURVE, lowest_bits=2.5, highest_bits=5).levels] == [4, 3]

    def test_an_empty_choice_is_refused_with_the_numbers(self) -> None:
        with pytest.raises(RecipeError, match=r"within 4\.5 to 5 bits"):
            BitsPolicy(CURVE, lowest_bits=4.5, highest_bits=5)

    @pytest.mark.parametrize("settings", [{"off_peak_queue": 5, "peak_queue": 5}, {"margin": 1.0}])
    def test_settings_that_make_no_sense_are_refused(self, settings: dict[str, float]) -> None:
        with pytest.raises(RecipeError, match=r"must"):
            BitsPolicy(CURVE, **settings)  # type: ignore[arg-type]


class TestQueue:
    def test_a_longer_queue_gets_fewer_bits_at_once(self) -> None:
        policy = BitsPolicy(CURVE, off_peak_queue=1, peak_queue=10)
        assert policy.switching_points == [4.0, 7.0, 10.0]
        assert [policy.bits_for_queue(q) for q in (0, 3, 4, 7, 9, 10, 500)] == [6, 6, 4, 3, 3, 2, 2]
        assert BitsPolicy(CURVE, off_peak_queue=1, peak_queue=10).bits_for_queue(50) == 2

    def test_bits_rise_only_once_the_load_has_fallen_by_the_margin(self) -> None:
        policy = BitsPolicy(CURVE, off_peak_queue=1, peak_queue=10, margin=0.25)
        policy.bits_for_queue(10)
        assert [policy.bits_for_queue(q) for q in (9, 8, 7.4, 6, 5, 4, 3, 2.9)] == [2, 2, 3, 3, 4, 4, 4, 6]

    def test_a_load_that_hovers_does_not_turn_the_dial_back_and_forth(self) -> None:
        policy = BitsPolicy(CURVE, off_peak_queue=1, peak_queue=10, margin=0.25)
        bits = [policy.bits_for_queue(queue) for queue in [6.9, 7.1] * 20]
        assert bits == [4, *[3] * 39]

    def test_without_a_margin_bits_follow_the_load(self) -> None:
        policy = BitsPolicy(CURVE, off_peak_queue=1, peak_queue=10, margin=0)
        assert [policy.bits_for_queue(queue) for queue in (6.9, 7.1, 6.9)] == [4, 3, 4]

    def test_one_level_serves_every_load(self) -> None:
        policy = BitsPolicy(CURVE[:1])
        assert [policy.bits_for_queue(q) for q in (0, 100)] == [2, 2]


class TestSpeed:
    def test_the_most_bits_that_are_fast_enough_are_taken(self) -> None:
        policy = BitsPolicy(CURVE)
        assert [policy.bits_for_speed(speed) for speed in (10, 80, 81, 120, 200)] == [6, 6, 4, 3, 2]
        assert not policy.saturated

    def test_a_speed_that_no_budget_gives_is_told(self) -> None:
        policy = BitsPolicy(CURVE)
        assert policy.bits_for_speed(201) == 2
        assert policy.saturated

    def test_bits_rise_only_if_the_speed_leaves_the_margin(self) -> None:
        policy = BitsPolicy(CURVE, margin=0.25)
        assert [policy.bits_for_speed(s) for s in (200, 149, 121, 119, 81, 79, 65, 64)] == [2, 2, 2, 3, 3, 4, 4, 6]

    def test_without_a_speed_curve_it_is_refused(self) -> None:
        with pytest.raises(RecipeError, match="holds no speeds"):
            BitsPolicy([CurvePoint(2, 40.0), CurvePoint(4, 20.0)]).bits_for_speed(10)


class TestStoredCurves:
    def test_quality_comes_from_the_checkpoint(self, finished: Run, tmp_path: Path) -> None:
        folder = shutil.copytree(finished[0] / "elastic", tmp_path / "elastic")
        (folder / "speed.json").unlink()
        rows = json.loads((folder / "results.json").read_text())["rows"]
        measured = {row["target_bits"]: row["perplexity"] for row in rows if row["allocation"] == "router"}
        policy = BitsPolicy.from_checkpoint(folder, max_perplexity_ratio=100)
        assert {level.bits: level.perplexity for level in policy.levels}.items() <= measured.items()
        assert all(level.tokens_per_second is None for level in policy.levels)

    def test_speed_is_measured_stored_and_used(self, finished: Run, tmp_path: Path) -> None:
        folder = shutil.copytree(finished[0] / "elastic", tmp_path / "elastic")
        rows = measure_speed(mobiq_lightning.load(folder), [2, 8], new_tokens=4, repeats=1)
        assert [row["used_bits"] for row in rows] == [2, 8]
        store_speed(folder, rows)
        policy = BitsPolicy.from_checkpoint(folder, max_perplexity_ratio=100)
        assert all(level.tokens_per_second for level in policy.levels)  # 2.5 bits is interpolated
        assert policy.bits_for_speed(1e9) == policy.levels[-1].bits

    def test_speed_of_another_device_is_not_used_and_named_when_it_is_asked_for(
        self, finished: Run, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(finished[0] / "elastic", tmp_path / "elastic")
        store_speed(folder, [{"bits": 2, "used_bits": 2, "tokens_per_second": 1}])
        stored = json.loads((folder / "speed.json").read_text())
        stored["environment"]["device"] = "another GPU"
        (folder / "speed.json").write_text(json.dumps(stored))
        policy = BitsPolicy.from_checkpoint(folder, max_perplexity_ratio=100)
        assert policy.bits_for_queue(0) == policy.levels[0].bits
        with pytest.raises(RecipeError, match="was measured on another GPU, this is"):
            policy.bits_for_speed(1)

    def test_speeds_of_other_budgets_stay_unless_they_are_of_another_machine(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def store(bits: float, speed: float, **where: str) -> list[tuple[float, float]]:
            store_speed(tmp_path, [{"bits": bits, "used_bits": bits, "tokens_per_second": speed}], **where)
            rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
            return [(row["bits"], row["tokens_per_second"]) for row in rows]

        assert store(8, 1) == [(8, 1)]
        assert store(2, 1) == [(2, 1), (8, 1)]
        assert store(8, 2) == [(2, 1), (8, 2)]
        assert capsys.readouterr().err == ""
        assert store(3, 3, device="another GPU", path="kernels") == [(3, 3)]
        said = capsys.readouterr().err
        assert "are replaced by those at 3 bits here (another GPU, kernels)" in said
        (tmp_path / "speed.json").write_text("{")
        assert store(4, 4) == [(4, 4)]
        assert "is not valid JSON" in (said := capsys.readouterr().err)
        assert "It is written anew." in said

    def test_no_budget_is_above_what_an_export_holds(self, finished: Run, tmp_path: Path) -> None:
        folder = tmp_path / "cut"
        assert main(["export", str(finished[0]), "--to", str(folder), "--max-bits", "4"]) == 0
        policy = BitsPolicy.from_checkpoint(folder, max_perplexity_ratio=100)
        assert max(level.bits for level in policy.levels) <= 4
        mobiq_lightning.load(folder).set_bits(policy.bits)

    def test_a_checkpoint_without_results_is_refused(self, finished: Run, tmp_path: Path) -> None:
        folder = shutil.copytree(finished[0] / "elastic", tmp_path / "elastic")
        (folder / "results.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no results\.json"):
            BitsPolicy.from_checkpoint(folder)


def test_the_example_serves_a_queue(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Path(__file__).parents[2] / "examples" / "serve_under_load.py"
    monkeypatch.setattr(sys, "argv", [str(example), str(finished[0]), "--new-tokens", "2"])
    capsys.readouterr()
    runpy.run_path(str(example), run_name="__main__")
    output = capsys.readouterr().out
    steps = [line for line in output.splitlines() if line.startswith("step")]
    assert len(steps) > 8
    assert any(" 2 bits asked for, 2.00 used" in line for line in steps)


@pytest.mark.parametrize(
    ("curve", "settings", "message"),
    [
        (None, {}, "curve None: a list of CurvePoint is expected"),
        ("curve", {}, "curve 'curve': a list of CurvePoint is expected"),
        ([1, 2], {}, r"curve \[1, 2\]: a list of CurvePoint"),
        ([CurvePoint(2, float("nan"))], {}, "with finite bits and perplexities above 0"),
        ([CurvePoint(2, 0.0)], {}, "with finite bits and perplexities above 0"),
        (CURVE, {"margin": "0.1"}, r"margin \('0.1'\) must be a finite number"),
        (CURVE, {"lowest_bits": float("nan")}, r"lowest_bits \(nan\) must be a finite number"),
        (CURVE, {"peak_queue": None}, r"peak_queue \(None\) must be a finite number"),
    ],
)
def test_arguments_that_make_no_sense_are_named(curve: Any, settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        BitsPolicy(curve, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "prompt ' '; a text that is not empty"),
        ({"prompt": 3}, "prompt 3; a text"),
        ({"max_new_tokens": -1}, r"max_new_tokens \(-1\)"),
        ({"temperature": float("nan")}, r"temperature \(nan\)"),
        ({"temperature": "hot"}, r"temperature \('hot'\)"),
        ({"seed": -1}, r"seed \(-1\)"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_before_anything_is_loaded(changes: Any, message: str) -> None:
    given = {"run": "nowhere", "prompt": "a", "bits": 3, "max_new_tokens": 1, "temperature": 0.0, "seed": 0, **changes}
    with pytest.raises(RecipeError, match=message):
        continue_prompt(**given)
