"""What the user is told reaches the user, or nobody, but ends in no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mobiq_lightning.console import as_utf8
from mobiq_lightning.loggers import WandbLogger

COMMAND = f"{sys.executable} -m mobiq_lightning"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&- <&-"])
def test_commands_run_with_standard_streams_closed(closed: str) -> None:
    done = shell(f"{COMMAND} recipes ls {closed}")
    assert (done.returncode, done.stderr) == (0, "")


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "import os, sys; from mobiq_lightning.console import make_streams_usable; make_streams_usable();"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'printed by a library'); print('to nobody');"
        "sys.exit(file.fileno() < 3)"
    )
    done = shell(f'{sys.executable} -c "{code}" >&- 2>&- <&-')
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_what_a_terminal_cannot_show_becomes_a_question_mark() -> None:
    code = "from mobiq_lightning.console import make_streams_usable; make_streams_usable(); print('\u00e9 \u2502')"
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        done = shell(f'{sys.executable} -c "{ascii(code)[1:-1]}"', **environment)
        assert (done.stdout, done.stderr) == ("? ?\n", "")


def test_texts_of_the_command_line_are_utf8_whatever_the_locale_says() -> None:
    assert as_utf8("\u00e9".encode().decode("ascii", "surrogateescape")) == "\u00e9"
    assert as_utf8("\udcff") == "\ufffd"


def test_wandb_writes_nothing_where_it_is_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = WandbLogger()
    logger.use_folder(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.plot_against_bits()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []
    assert os.environ["WANDB_MODE"] == "disabled"


def test_a_table_that_nobody_reads_any_more_is_told_from_other_errors() -> None:
    code = (
        "from mobiq_lightning.console import table_console; from mobiq_lightning.jobs import exit_code; import sys\n"
        "sys.exit(exit_code(lambda: [table_console().print('x' * 100) for _ in range(10_000)]))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) == 141
