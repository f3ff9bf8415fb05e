"""Exporting deletes nothing that is not a checkpoint, and copies nothing that was not compared with what was written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mobiq_lightning.checkpoint import export, verify
from mobiq_lightning.checkpoint.check import OTHER_FILE
from mobiq_lightning.cli import main
from mobiq_lightning.errors import CheckpointError, MobiqError
from mobiq_lightning.runs import HASHES, INDEX
from tests.checkpoints import edit_json, tensors_of, write_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class TestTarget:
    """What is in the way stays as it is, to the last byte, unless it is an elastic checkpoint and nothing else."""

    def refused(self, source: Path, to: Path, message: str) -> None:
        before = contents(to)
        with pytest.raises(CheckpointError, match=message):
            export(source, to, overwrite=True)
        assert contents(to) == before
        assert not [path for path in to.resolve().parent.iterdir() if path.name.startswith(f".{to.name}")]

    def test_a_folder_of_photos(self, elastic: Path, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "one.jpg").write_bytes(b"\xff\xd8")
        self.refused(elastic, tmp_path / "photos", "is no elastic checkpoint and is not replaced")

    def test_an_empty_folder(self, elastic: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        self.refused(elastic, tmp_path / "empty", "is no elastic checkpoint and is not replaced")

    def test_the_run_folder(self, elastic: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        shutil.move(elastic, run / "elastic")
        (run / "notes.txt").write_text("mine")
        self.refused(run, run, "lies in")

    def test_a_folder_within_the_checkpoint(self, elastic: Path) -> None:
        (elastic / "copy").mkdir()
        self.refused(elastic, elastic / "copy", "holds")

    def test_a_source_model(self, elastic: Path, make_model: Any) -> None:
        self.refused(elastic, make_model(), "is no elastic checkpoint and is not replaced")

    def test_a_checkpoint_beside_which_somebody_keeps_notes(self, elastic: Path, tmp_path: Path) -> None:
        export(elastic, tmp_path / "copy")
        (tmp_path / "copy" / "notes.txt").write_text("mine")
        self.refused(elastic, tmp_path / "copy", "also holds notes.txt, which no export wrote")

    def test_a_checkpoint_beside_which_somebody_keeps_other_tensors(self, elastic: Path, tmp_path: Path) -> None:
        export(elastic, tmp_path / "copy")
        (tmp_path / "copy" / "adapter_model.safetensors").write_bytes(b"mine")
        self.refused(elastic, tmp_path / "copy", "also holds adapter_model.safetensors, which no export wrote")

    def test_a_place_where_nothing_can_be_written(self, elastic: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot be written"):
            export(elastic, "/proc/copy")

    def test_a_checkpoint_that_cannot_be_told_from_other_files(self, elastic: Path, tmp_path: Path) -> None:
        export(elastic, tmp_path / "copy")
        (tmp_path / "copy" / HASHES).unlink()
        self.refused(elastic, tmp_path / "copy", f"has no {HASHES}")

    @pytest.mark.parametrize("to", [".", "..", "elastic", "a\0b", "x" * 300])
    def test_names_that_are_no_new_folder(
        self, elastic: Path, to: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(elastic.parent)
        assert main(["export", str(elastic), "--to", to, "--overwrite"]) in (1, 2)
        assert capsys.readouterr().err.startswith("error: ")
        assert verify(elastic) == []

    def test_a_checkpoint_is_replaced(self, elastic: Path, tmp_path: Path) -> None:
        export(elastic, tmp_path / "copy")
        export(elastic, tmp_path / "copy", max_bits=3, overwrite=True)
        assert verify(tmp_path / "copy") == []
        assert not any(name.endswith("plane_3") for name in tensors_of(tmp_path / "copy"))

    def test_a_link_to_a_checkpoint_stays_a_link(self, elastic: Path, tmp_path: Path) -> None:
        export(elastic, tmp_path / "real")
        (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
        export(elastic, tmp_path / "link", max_bits=3, overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert verify(tmp_path / "real") == []

    def test_what_is_replaced_is_there_until_the_copy_is_whole(self, elastic: Path, tmp_path: Path) -> None:
        export(elastic, tmp_path / "copy")
        before = contents(tmp_path / "copy")
        shard = sorted(elastic.glob("*.safetensors"))[-1]
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(CheckpointError, match="nothing was exported"):
            export(elastic, tmp_path / "copy", overwrite=True)
        assert contents(tmp_path / "copy") == before


class TestSource:
    """Damage is not copied, so that it never gets hashes that fit."""

    def refused(self, source: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            export(source, source.parent / "copy")
        assert not (source.parent / "copy").exists()

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX])
    def test_a_changed_file(self, elastic: Path, name: str) -> None:
        (elastic / name).write_bytes((elastic / name).read_bytes() + b"\n")
        self.refused(elastic, f"{name}{OTHER_FILE}")

    def test_a_missing_shard(self, elastic: Path) -> None:
        sorted(elastic.glob("*.safetensors"))[1].unlink()
        self.refused(elastic, "model-00002-of-00003.safetensors is missing")

    def test_a_missing_tokenizer(self, elastic: Path) -> None:
        (elastic / "tokenizer.json").unlink()
        self.refused(elastic, "tokenizer.json is missing")

    @pytest.mark.parametrize("name", ["results.json", "speed.json", "provenance.json"])
    def test_damaged_figures(self, elastic: Path, name: str) -> None:
        (elastic / name).write_text("{garbage")
        with pytest.raises(MobiqError, match=f"{name}.* not valid JSON"):
            export(elastic, elastic.parent / "copy")
        assert not (elastic.parent / "copy").exists()
        assert any(name in problem and "not valid JSON" in problem for problem in verify(elastic))

    def test_no_hashes(self, elastic: Path) -> None:
        (elastic / HASHES).unlink()
        self.refused(elastic, f"has no {HASHES}, so whether it is whole cannot be told; nothing was exported")

    def test_no_hashes_of_tensors(self, elastic: Path) -> None:
        edit_json(elastic, HASHES, lambda hashes: hashes["tensors"].clear())
        self.refused(elastic, f"has no hash in {HASHES}")

    def test_what_is_no_part_of_it_stays_and_is_said(
        self, elastic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "secret").write_text("secret")
        (elastic / "notes.txt").symlink_to(tmp_path / "secret")
        (elastic / ".model-00001-of-00003.safetensors.1.tmp").write_bytes(b"half")
        export(elastic, tmp_path / "copy")
        said = capsys.readouterr().err
        assert "notes.txt" in said
        assert "not exported" in said
        assert not {"notes.txt", ".model-00001-of-00003.safetensors.1.tmp"} & contents(tmp_path / "copy").keys()
        assert verify(tmp_path / "copy") == []


class TestCompanions:
    """What belongs to the source model beside its weights."""

    @pytest.fixture
    def source(self, make_model: Any, tmp_path: Path) -> Path:
        return shutil.copytree(make_model(), tmp_path / "source")

    def test_templates_in_a_folder_below_come_along_and_have_hashes(self, source: Path, tmp_path: Path) -> None:
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
        export(write_checkpoint(source, tmp_path / "elastic"), tmp_path / "copy")
        template = tmp_path / "copy" / "additional_chat_templates" / "tool_use.jinja"
        assert template.read_text() == "{{ messages }}"
        template.write_text("{{ other }}")
        assert verify(tmp_path / "copy") == [f"additional_chat_templates/tool_use.jinja{OTHER_FILE}"]

    def test_a_link_to_elsewhere_is_not_published(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret")
        (source / "LICENSE").symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match="LICENSE would be copied into the checkpoint, and is a link"):
            write_checkpoint(source, tmp_path / "elastic")
        assert not (tmp_path / "elastic").exists()
