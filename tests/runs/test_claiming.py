"""Who may work in a run folder: one run at a time, of one recipe, and nothing in it is lost that is not ours."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mobiq_lightning.errors import RunFolderError
from mobiq_lightning.runs import RunFolder, check_identity

HOLDING = """
import sys, time
from mobiq_lightning.runs import RunFolder
RunFolder(sys.argv[1]).lock()
print(flush=True)
time.sleep(60)
"""


def recipe(**model: Any) -> dict[str, Any]:
    return {"model": model, "trainer": {"callbacks": None}}


def finish_an_epoch(folder: Path) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "epoch-000000.ckpt").write_bytes(b"learned")


def test_a_second_run_is_told_who_works_in_the_folder_and_a_killed_one_does_not_block_it(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(RunFolderError, match=f"process {process.pid} on .* is at work in this folder"):
        RunFolder(tmp_path / "run").lock()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "run" / ".lock").exists()
    with RunFolder(tmp_path / "run").locked(), pytest.raises(RunFolderError, match=f"process {os.getpid()} on"):
        RunFolder(tmp_path / "run").lock()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_whose_folder_is_removed_notices_even_if_there_is_another_since(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with first.locked():
        first.check_in_place()
        (tmp_path / "run").rename(tmp_path / "moved")
        with second.locked():
            second.check_in_place()
            with pytest.raises(RunFolderError, match="was removed or moved away while its run was at work"):
                first.check_in_place()
        first.release()
        second.check_in_place()


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file", "file exists"),
        ("file/run", "not a directory"),
        ("x" * 300, "file name too long"),
        ("a\0b", "null byte"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_in_a_line(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=f"cannot be made or written to .*{reason}"):
        RunFolder(tmp_path / place).lock()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("metrics.jsonl", "metrics.jsonl is a folder, and a file metrics.jsonl is written there"),
        ("results.csv", "results.csv is a folder, and a file results.csv is written there"),
        ("elastic", "elastic is a file, and a folder elastic is written there"),
    ],
)
def test_a_folder_where_a_file_is_to_be_written_is_refused_at_the_start(tmp_path: Path, name: str, said: str) -> None:
    stray = tmp_path / name
    stray.write_text("mine") if "." not in name else stray.mkdir()
    for start in (
        RunFolder(tmp_path).check_place,
        lambda: RunFolder(tmp_path).claim(recipe(), overwrite=False),
        lambda: RunFolder(tmp_path).claim(recipe(), overwrite=True),
    ):
        with pytest.raises(RunFolderError, match=re.escape(f"{said}. Move it away")):
            start()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_run_that_has_finished_no_epoch_gives_way_to_a_corrected_recipe(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(recipe(pretrained="wrong"), overwrite=False)
    check_identity(tmp_path, {"source weights": "1"})
    (tmp_path / "retries.json").write_text('{"0": 3}')
    (tmp_path / "generated_text").mkdir()
    (tmp_path / "generated_text" / "tokens-1.safetensors").write_text("costly")
    assert folder.claim(recipe(pretrained="right"), overwrite=False) is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "generated_text"]
    check_identity(tmp_path, {"source weights": "2"})
    check_identity(tmp_path, {"source weights": "3"})  # files were mended before the first epoch
    finish_an_epoch(tmp_path)
    with pytest.raises(RunFolderError, match=r"model\.pretrained: 'right' -> 'other'"):
        folder.claim(recipe(pretrained="other"), overwrite=False)
    with pytest.raises(RunFolderError, match="source weights: 3 then, 4 now"):
        check_identity(tmp_path, {"source weights": "4"})
    assert (tmp_path / "generated_text" / "tokens-1.safetensors").read_text() == "costly"


@pytest.mark.parametrize("content", ["", "a: [", "- 1", "trainer: 3", "trainer: {callbacks: 7}"])
def test_a_damaged_recipe_is_replaced_where_nothing_is_lost_and_named_where_something_is(
    tmp_path: Path, content: str
) -> None:
    folder = RunFolder(tmp_path)
    assert folder.claim(recipe(), overwrite=False) is False
    heading = (tmp_path / "config.yaml").read_text().partition("\n")[0]
    (tmp_path / "config.yaml").write_text(f"{heading}\n{content}")
    assert folder.claim(recipe(), overwrite=False) is False
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(RunFolderError, match=r"config\.yaml is there and no run has written it: it would be replaced"):
        folder.claim(recipe(), overwrite=False)
    assert (tmp_path / "config.yaml").read_text() == content
    finish_an_epoch(tmp_path)
    with pytest.raises(RunFolderError, match=r"(?s)config\.yaml .*so what made checkpoints beside it is unknown"):
        folder.claim(recipe(), overwrite=False)


def test_an_empty_half_of_a_removed_run_does_not_keep_the_same_command_out(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch-000000.sha256").write_text("")
    assert RunFolder(tmp_path).claim(recipe(), overwrite=False) is False
    (tmp_path / "config.yaml").unlink()
    finish_an_epoch(tmp_path)
    with pytest.raises(RunFolderError, match=r"holds checkpoints but no config\.yaml"):
        RunFolder(tmp_path).claim(recipe(), overwrite=False)


def test_overwriting_follows_no_link_but_to_training_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    for name in ("checkpoints", "elastic"):
        (disk / name).mkdir(parents=True)
        (disk / name / "mine.txt").write_text("mine")
        run.mkdir(exist_ok=True)
        (run / name).symlink_to(disk / name)
    (disk / "checkpoints" / "epoch-000000.ckpt").write_text("")
    (disk / "checkpoints" / "epoch-000000.sha256").write_text("")
    (run / "notes.txt").write_text("mine")
    (disk / "checkpoints" / f"block-000000-schemes-{64 * 'a'}.part").write_text("")
    (disk / "checkpoints" / "another-run.ckpt").write_text("mine")
    assert RunFolder(run).claim(recipe(), overwrite=True) is False
    RunFolder(run).begin()
    assert sorted(p.name for p in (disk / "checkpoints").iterdir()) == ["another-run.ckpt", "mine.txt"]
    assert [p.name for p in (disk / "elastic").iterdir()] == ["mine.txt"]
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml", "notes.txt"]
    assert "elastic was a link; the link is removed" in capsys.readouterr().err


class TestOverwriting:
    """The old run is there until the new one has begun."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        folder = RunFolder(tmp_path)
        folder.claim(recipe(), overwrite=False)
        finish_an_epoch(tmp_path)
        (tmp_path / "elastic").mkdir()
        (tmp_path / "elastic" / "config.json").write_text("{}")
        (tmp_path / "results.json").write_text("{}")
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "log").write_text("log")
        return tmp_path

    def contents(self, folder: Path) -> dict[str, bytes]:
        found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        found.pop(".lock", None)
        return found

    def fail(self, run: Path) -> None:
        """A start that writes something and fails."""
        folder = RunFolder(run)
        folder.lock()
        assert folder.claim(recipe(pretrained="typo"), overwrite=True) is False
        assert not folder.finished_work
        (run / "metrics.jsonl").write_text("new")
        (run / "results.json").write_text("new")
        folder.release()

    def test_a_start_that_fails_leaves_the_run_as_it_was(self, run: Path) -> None:
        before = self.contents(run)
        self.fail(run)
        after = self.contents(run)
        after.pop("metrics.jsonl")  # of a run that had none
        assert after == before
        assert RunFolder(run).claim(recipe(), overwrite=False) is True

    def test_a_start_that_is_killed_leaves_the_run_for_the_next_start(self, run: Path) -> None:
        before = self.contents(run)
        RunFolder(run).claim(recipe(pretrained="typo"), overwrite=True)  # and no more of that process
        assert not (run / "results.json").exists()
        with RunFolder(run).locked():
            assert self.contents(run) == before

    def test_a_kill_while_the_old_run_is_removed_brings_nothing_of_it_back(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = RunFolder(run)
        folder.claim(recipe(pretrained="other"), overwrite=True)
        with monkeypatch.context() as patch:
            patch.setattr(
                "mobiq_lightning.runs.set_aside.remove", lambda path: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                folder.begin()
        with RunFolder(run).locked():
            assert self.contents(run).keys() == {"config.yaml"}
            assert "other" in (run / "config.yaml").read_text()

    def test_a_start_that_begins_leaves_nothing_of_it(self, run: Path) -> None:
        folder = RunFolder(run)
        folder.lock()
        folder.claim(recipe(pretrained="other"), overwrite=True)
        folder.begin()
        folder.release()
        assert self.contents(run).keys() == {"config.yaml"}
        assert "other" in (run / "config.yaml").read_text()


def test_a_corrected_recipe_removes_nothing_that_no_run_has_written(tmp_path: Path) -> None:
    for name in ("csv/mydata.csv", "wandb/run-1/run.wandb", "results.csv", "results.png", "diagnostics.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    folder = RunFolder(tmp_path)
    folder.claim(recipe(pretrained="wrong"), overwrite=False)
    (tmp_path / "csv" / "version_0").mkdir()
    folder.claim(recipe(pretrained="right"), overwrite=False)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {
        "config.yaml",
        "csv/mydata.csv",
        "wandb/run-1/run.wandb",
        "results.csv",
        "results.png",
        "diagnostics.json",
    }
    assert not (tmp_path / "csv" / "version_0").exists()


def test_a_run_that_is_killed_while_its_results_are_written_is_not_finished(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "elastic").mkdir()
    (tmp_path / "elastic" / "config.json").write_text("{}")
    (tmp_path / "results.json").write_text("{}")
    assert folder.finished
    with pytest.raises(KeyboardInterrupt), folder.comparing():
        raise KeyboardInterrupt
    assert not folder.finished
    with folder.comparing():
        pass
    assert folder.finished


def test_what_killed_runs_left_in_the_folder_is_removed_when_it_is_locked(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for name in (".results.json", "checkpoints/.epoch-000001.ckpt", "elastic.partial/.model-1.safetensors", ".mine"):
        path = tmp_path / f"{name}.{process.pid}.tmp"
        path.parent.mkdir(exist_ok=True)
        path.write_text("part")
    with RunFolder(tmp_path).locked():
        left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.tmp")]
    assert left == [f".mine.{process.pid}.tmp"]


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}', '{"0": "a"}', '{"0": 1e999}', '{"0": -1}'])
def test_damaged_counts_of_retries_are_named_with_what_to_do(tmp_path: Path, content: str) -> None:
    (tmp_path / "retries.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"retries\.json .*Remove the file: the run goes on"):
        RunFolder(tmp_path).retries.counts()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"source weights": 3}'])
def test_a_damaged_identity_is_named_with_what_to_do(tmp_path: Path, content: str) -> None:
    finish_an_epoch(tmp_path)
    (tmp_path / "identity.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"identity\.json .*remove it: the run goes on"):
        check_identity(tmp_path, {"source weights": "1"})
    assert (tmp_path / "identity.json").read_text() == content
