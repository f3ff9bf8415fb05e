"""What the kernels are to reach, beside what the latency command measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks are not installed

from benchmarks.latency_targets import GOOD, MISSED, NOT_MEASURED, TARGETS, WORLD_CLASS, beside_targets, main


def row(bits: float, of_copy: float, **other: Any) -> dict[str, Any]:
    where = {"section": "decode", "path": "kernels", "shape": "llama-2-7b.gate_up", "tokens": 1}
    return {**where, "product": "elastic", "bits": bits, "of_copy": of_copy, "times_plain": 1.0, **other}


def results_file(folder: Path, path: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / "latency.json"
    file.write_text(json.dumps({"path": path, "environment": {"device": "Some GPU 9000"}, "rows": rows}))
    return file


@pytest.mark.parametrize(
    ("of_copy", "verdict"), [(0.64, MISSED), (0.65, GOOD), (0.74, GOOD), (0.75, WORLD_CLASS), (0.9, WORLD_CLASS)]
)
def test_a_figure_is_missed_good_or_world_class(of_copy: float, verdict: str) -> None:
    assert TARGETS[0].verdict([row(4, of_copy)]) == verdict


def test_what_was_not_measured_says_so() -> None:
    assert TARGETS[0].verdict([]) == NOT_MEASURED
    assert TARGETS[0].verdict([row(2, 0.9)]) == NOT_MEASURED
    assert TARGETS[0].verdict([row(4, 0.9, path="reference")]) == NOT_MEASURED
    assert TARGETS[0].verdict([row(4, 0.9, error="failed")]) == NOT_MEASURED


def test_every_target_finds_the_row_that_its_section_writes() -> None:
    for target in TARGETS:
        found = {"path": "kernels", **target.where, target.figure: target.world_class}
        assert target.verdict([found]) == WORLD_CLASS
        assert target.good <= target.world_class
    assert len({target.name for target in TARGETS}) == len(TARGETS)
    entry = beside_targets([row(4, 0.7)])[0]
    assert (entry["measured"], entry["verdict"]) == (0.7, GOOD)


def test_the_reference_meets_no_target_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(4, 0.9, path="reference")]
    main([str(results_file(tmp_path, "reference", rows)), "--to", str(tmp_path / "targets.json")])
    assert "targets of the kernels, set for an H200, are not measured" in capsys.readouterr().out
    stored = json.loads((tmp_path / "targets.json").read_text())
    assert [target["verdict"] for target in stored] == [NOT_MEASURED] * len(TARGETS)


def test_targets_stand_beside_what_kernels_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(results_file(tmp_path, "kernels", [row(4, 0.71), row(2, 0.31)]))])
    printed = capsys.readouterr().out
    assert "Targets, set for an H200; measured on Some GPU 9000" in printed
    lines = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.count("│") > 4}
    four, two = (lines[f"1 token, gate_up at {bits} bits: share of copy bandwidth"] for bits in (4, 2))
    assert "71%" in four
    assert GOOD in four
    assert "31%" in two
    assert MISSED in two
