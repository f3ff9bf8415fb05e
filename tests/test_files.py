"""Atomic writes: what they leave when they fail or are killed, and how that is removed."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mobiq_lightning.files import (
    folder_replaced_atomically,
    is_leftover,
    remove,
    remove_leftovers,
    replace_folder,
    write_atomically,
)


def pid_of_a_dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_dead_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    dead, alive = pid_of_a_dead_process(), os.getppid()
    (tmp_path / f".results.json.{dead}.tmp").write_text("{")
    (tmp_path / f".elastic.{dead}.tmp").mkdir()
    (tmp_path / f".elastic.{dead}.tmp" / "shard").write_text("part")
    kept = [f".a.json.{alive}.tmp", f".a.json.{dead}@another-machine.tmp", ".notes.tmp", "notes.1.tmp"]
    for name in kept:
        (tmp_path / name).write_text("kept")
    assert remove_leftovers(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_only_leftovers_of_the_given_names_are_removed(tmp_path: Path) -> None:
    dead = pid_of_a_dead_process()
    for name in ("config.yaml", "photos"):
        (tmp_path / f".{name}.{dead}.tmp").write_text("")
    remove_leftovers(tmp_path, {"config.yaml"})
    assert [path.name for path in tmp_path.iterdir()] == [f".photos.{dead}.tmp"]


def test_leftovers_of_an_earlier_process_with_the_same_id_are_removed_and_those_in_use_are_not(tmp_path: Path) -> None:
    with folder_replaced_atomically(tmp_path / "copy") as unfinished:
        (tmp_path / f".other.{os.getpid()}.tmp").mkdir()
        remove_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [unfinished.name]
        assert is_leftover(unfinished.name)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


class Killed(BaseException):
    """A kill between two renames."""


def test_a_kill_between_the_two_renames_of_a_folder_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("new", "elastic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rename = os.replace

    def killed_before_the_second(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed_before_the_second)
    with pytest.raises(Killed):
        replace_folder(tmp_path / "new", tmp_path / "elastic")
    monkeypatch.undo()
    assert not (tmp_path / "elastic").exists()
    assert remove_leftovers(tmp_path) == ["elastic"]
    assert (tmp_path / "elastic" / "file").read_text() == "elastic"
    replace_folder(tmp_path / "new", tmp_path / "elastic")
    assert [path.name for path in tmp_path.iterdir()] == ["elastic"]
    assert (tmp_path / "elastic" / "file").read_text() == "new"


def test_a_folder_that_is_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    for name in ("new", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "elastic").symlink_to(tmp_path / "elsewhere")
    replace_folder(tmp_path / "new", tmp_path / "elastic")
    assert (tmp_path / "elastic" / "file").read_text() == "new"
    assert (tmp_path / "elsewhere" / "file").read_text() == "elsewhere"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    remove(tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elastic", "elsewhere"]


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """Files may have at most 4 KB, as a disk with as much left would have it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files_only")
@pytest.mark.parametrize("library", ["python", "torch", "safetensors"])
def test_what_cannot_be_written_is_an_error_of_the_system_that_names_the_file(tmp_path: Path, library: str) -> None:
    tensor, path = torch.zeros(10_000), tmp_path / "state"
    write = {
        "python": lambda temporary: temporary.write_bytes(bytes(10_000)),
        "torch": lambda temporary: torch.save({"a": tensor}, temporary),
        "safetensors": lambda temporary: save_file({"a": tensor}, temporary),
    }[library]
    path.write_text("what was there before")
    with pytest.raises(OSError, match="state") as found:
        write_atomically(path, write)
    assert (found.value.errno, found.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "what was there before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("said", ["basic_ios::clear: iostream error", "[enforce fail at inline_container.cc:672]"])
def test_what_torch_says_of_a_full_disk_is_the_disks_error(tmp_path: Path, said: str) -> None:
    def write(temporary: Path) -> None:
        temporary.symlink_to("/dev/full")
        raise RuntimeError(said)

    with pytest.raises(OSError, match="No space left on device") as refused:
        write_atomically(tmp_path / "epoch-000001.ckpt", write)
    assert refused.value.errno == errno.ENOSPC
    assert refused.value.filename == str(tmp_path / "epoch-000001.ckpt")


def test_another_error_while_writing_is_not_the_disks(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("")
        raise RuntimeError("cannot pickle that")

    with pytest.raises(RuntimeError, match="cannot pickle that"):
        write_atomically(tmp_path / "file", write)
    assert list(tmp_path.iterdir()) == []
