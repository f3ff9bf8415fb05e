"""The example runs as it stands, on a recipe of small settings."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import Run

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_the_quickstart_goes_from_a_recipe_to_a_plot(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(run)])
    capsys.readouterr()
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = re.findall(r"^(\S+) bits: loss (\S+), used (\S+) bits", capsys.readouterr().out, flags=re.MULTILINE)
    assert [float(bits) for bits, _, _ in lines] == [2, 2.5, 3, 4, 6, 8]
    used = [float(bits) for _, _, bits in lines]
    assert used == sorted(used)
    assert (used[0], used[-1]) == (2, 8)
    assert (run / "quickstart.png").read_bytes().startswith(b"\x89PNG")
