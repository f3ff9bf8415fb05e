"""Local files with text, and rows of data sets: each text is one, or an error says which row holds what instead."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mobiq_lightning.errors import DataError, FileError
from mobiq_lightning.input_files import open_regular, parse_json, read_text

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_SEPARATOR = re.compile(r"^\s*<\|endoftext\|>\s*$", re.MULTILINE)


def find_file(source: str) -> Path | None:
    """The path that a source names, whatever lies there; None if nothing does."""
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long a name, or the home of a user who is not there
        return None


def check_kind(path: Path, key: str) -> None:
    """Makes sure that a file is a regular one, of a kind that can be read; what is in it is not looked at.

    Args:
        path: The file.
        key: Recipe key that names it, for messages.

    Raises:
        DataError: If it is not.
    """
    try:
        open_regular(path).close()
    except FileError as error:
        raise DataError(f"{key}: {error}") from error
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{key}: {path.name} ends in {path.suffix!r}; .txt, .jsonl and .parquet can be read")


def read_file(path: Path, key: str) -> list[str]:
    """The documents of a local file.

    Args:
        path: A .txt, .jsonl or .parquet file.
        key: Recipe key that names it, for messages.

    Raises:
        DataError: If it is no regular file, of another kind, damaged, in another encoding, or has rows that are no text.
    """
    read = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    where = f"{key}: {path}"
    check_kind(path, key)
    try:
        return read[path.suffix](path, where)
    except FileError as error:
        raise DataError(f"{key}: {error}") from error


def _read_txt(path: Path, where: str) -> list[str]:
    text = _decoded(path).replace("\r\n", "\n").replace("\r", "\n")
    documents = _SEPARATOR.split(text)
    # A text without separators is one document and stays as it is, to the last newline.
    documents = [d.strip("\n") for d in documents] if len(documents) > 1 else documents
    return [d for d in documents if d.strip()]


def _decoded(path: Path) -> str:
    """What a text file of any size says, which must be in UTF-8.

    Raises:
        FileError: If it is in another encoding.
    """
    with open_regular(path) as file:
        begin = file.read(4)
    advice = "Convert it to UTF-8, as with: iconv -f ENCODING -t UTF-8"
    if begin[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in begin:
        raise FileError(f"{path} is not UTF-8 text: it begins as UTF-16 or UTF-32 does. {advice}")
    size = path.stat().st_size
    try:
        return read_text(path, limit=size)
    except FileError as error:
        raise FileError(f"{error}. {advice}") from error


def _read_jsonl(path: Path, where: str) -> list[str]:
    values: list[Any] = []
    lines: list[int] = []
    keys: dict[str, None] = {}
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"line {number}")
        except FileError as error:
            raise DataError(f"{where} cannot be read as jsonl: {error}") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{where} cannot be read as jsonl: line {number} holds {_kind(row)}; each line is an object with a text, as in "
                '{"text": "..."}'
            )
        keys |= dict.fromkeys(row)
        values.append(row.get("text"))
        lines.append(number)
    if values and "text" not in keys:
        raise DataError(f"{where} has no column 'text'; columns are {', '.join(keys)}")
    return texts_of(values, where, lines)


def _read_parquet(path: Path, where: str) -> list[str]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    try:
        with open_regular(path) as file:
            names = parquet.read_schema(file).names
            values = parquet.read_table(file, columns=["text"]).column("text").to_pylist() if "text" in names else None
    except Exception as error:
        raise DataError(f"{where} cannot be read as parquet: {(str(error).splitlines() or [''])[0][:200]}") from error
    if values is None:
        raise DataError(f"{where} has no column 'text'; columns are {', '.join(names)}")
    return texts_of(values, where)


def texts_of(values: Iterable[Any], where: str, lines: Sequence[int] | None = None) -> list[str]:
    """The texts of rows, without those that are null.

    Args:
        values: What the rows hold: text, or its bytes in UTF-8.
        where: Where they come from, for messages.
        lines: The line of each row in its file, if it has one.

    Raises:
        DataError: If one is no text, with its line or row, counted from 1, and its type.
    """
    texts: list[str] = []
    for number, value in enumerate(values, start=1):
        if value is None:
            continue
        place = f"row {number}" if lines is None else f"line {lines[number - 1]}"
        try:
            text = value.decode("utf-8") if isinstance(value, bytes) else value
            if isinstance(text, str):
                text.encode("utf-8")
        except UnicodeError as error:
            raise DataError(f"{where}: the text of {place} is not UTF-8 ({error.reason})") from error  # type: ignore[attr-defined]
        if not isinstance(text, str):
            raise DataError(
                f"{where}: the text of {place} is {_kind(value)}, not text. Write what the model is to read into 'text', "
                "for chats what the tokenizer's apply_chat_template(messages, tokenize=False) gives"
            )
        texts.append(text)
    return texts


def _kind(value: Any) -> str:
    """What a value of a row is, in words."""
    if isinstance(value, list):
        return "a list of messages" if value and isinstance(value[0], dict) else "a list"
    names = {
        dict: "a mapping",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
