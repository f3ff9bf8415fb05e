"""Files that may be damaged or hostile are read within limits, or refused with what is wrong with which file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mobiq_lightning.errors import FileError
from mobiq_lightning.input_files import (
    DEPTH,
    YAML_BYTES,
    open_regular,
    parse_json,
    parse_yaml,
    read_json,
    read_mapping,
    read_text,
    read_yaml,
)


def test_json_and_yaml_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, "ü"]}', encoding="utf-8")
    (tmp_path / "a.yaml").write_text("a: [1, 2.5, null, ü]\n", encoding="utf-8-sig")
    expected = {"a": [1, 2.5, None, "ü"]}
    assert (
        read_json(tmp_path / "a.json")
        == read_mapping(tmp_path / "a.json")
        == read_yaml(tmp_path / "a.yaml")
        == expected
    )


def test_a_named_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match=r"pipe is a named pipe, not a regular file"):
        open_regular(tmp_path / "pipe")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a folder, not a regular file"):
        read_text(tmp_path)


@pytest.mark.parametrize("name", ["none.json", "x" * 300, "zero\0byte"])
def test_a_file_that_cannot_be_there_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, match=r"is missing|cannot be read"):
        read_json(tmp_path / name)


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FileError, match="has more than 1000 bytes"):
        read_json(tmp_path / "large.json", limit=1000)


def test_another_encoding_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("abc é".encode("latin-1"))
    with pytest.raises(FileError, match=r"is not UTF-8 text \(.* at byte 4\)"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "text", ["", "{", "[1,", "nul", "[" * 100_000, "9" * 100_000, f"{'[' * (DEPTH + 1)}{']' * (DEPTH + 1)}"]
)
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(FileError, match=r"^the file (is not valid JSON|is nested more than)"):
        parse_json(text, "the file")


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: !!python/object/apply:os.system [ls]",
        "[" * 5000,
        f"{'[' * 70}{']' * 70}",
        "9" * 5000,
        "2020-99-99",
        "&a [*a]",
        "{[a]: b}",
        "? {a: b}\n: c",
        "a: 1\n\tb: 2",
        "\x00",
        "x" * (YAML_BYTES + 1),
    ],
)
def test_what_is_not_plain_yaml_is_refused(text: str) -> None:
    with pytest.raises(FileError, match=r"^the recipe "):
        parse_yaml(text, "the recipe")


def test_aliases_that_multiply_are_refused_and_few_are_not() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(FileError, match=r"stands for 1[0-9]+ values"):
        parse_yaml("\n".join(lines), "the recipe")
    assert parse_yaml("\n".join(lines[:3]), "the recipe")["a2"][3][4] == ["x"] * 10


def test_a_mapping_is_told_from_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(FileError, match="holds list where a mapping is expected"):
        read_mapping(tmp_path / "a.json")
