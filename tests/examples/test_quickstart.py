"""The example runs as it stands, on a recipe of small settings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import Run

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_the_quickstart_goes_from_a_recipe_to_a_plot(finished: Run, tmp_path: Path) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(run)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(\S+) bits: loss (\S+), used (\S+) bits", done.stdout, flags=re.MULTILINE)
    assert [float(bits) for bits, _, _ in lines] == [2, 2.5, 3, 4, 6, 8]
    used = [float(bits) for _, _, bits in lines]
    assert used == sorted(used)
    assert (used[0], used[-1]) == (2, 8)
    assert (run / "quickstart.png").read_bytes().startswith(b"\x89PNG")
