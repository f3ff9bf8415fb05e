"""Memory against the size of the model: what is committed beside what is predicted now."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling.memory import PHASES, ROOT, large, predicted, recipe, table
from benchmarks.scaling.watch import Watch

ROWS: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())["rows"]
PAGE = ROOT / "docs" / "results" / "memory.md"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_what_is_predicted_is_within_a_fifth_of_what_was_measured(row: dict[str, Any], tmp_path: Path) -> None:
    foreseen = predicted(row["shape"], recipe("random", tmp_path, tmp_path / "text.txt"))["host"]
    off = {phase: foreseen[phase] / row["phases"][phase]["peak"] - 1 for phase in PHASES}
    assert {phase: share for phase, share in off.items() if abs(share) > 0.2} == {}


def test_the_page_shows_the_committed_rows_and_what_is_predicted_of_larger_models() -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in (*table(ROWS), *large()) if line not in page] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_phase_is_charged_with_the_memory_that_it_takes_and_no_other() -> None:
    watch = Watch()
    with watch.within("takes"):
        held = bytearray(b"x") * 64_000_000
    del held
    watch.begin("after")
    found = watch.end()
    for kind in ("peak", "private"):
        assert found["takes"][kind] - found["after"][kind] > 50_000_000
