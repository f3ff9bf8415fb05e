"""Text sources, tokens and windows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mobiq_lightning.errors import DataError
from mobiq_lightning.sources import IGNORED, TextWindows, pad_windows
from mobiq_lightning.sources.text import read_documents, tokenize
from tests.conftest import make_tokenizer

ROWS = ["", " = A title = ", "First row, long enough to be tokenized.", "", "Second row with other words in it."]


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return make_tokenizer()


def write_rows(folder: Path, suffix: str) -> Path:
    path = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS), encoding="utf-8")
    else:
        from datasets import Dataset

        Dataset.from_dict({"text": ROWS}).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_are_read_as_they_are_and_packed_as_the_papers_do(suffix: str, tmp_path: Path, tokenizer: object) -> None:
    documents = read_documents(str(write_rows(tmp_path, suffix)), "train", "data.source")
    assert documents == ROWS
    expected = tokenizer("\n\n".join(ROWS))["input_ids"]  # type: ignore[operator]
    assert tokenize(documents, tokenizer, "packed", "data.source") == [expected]


def test_a_text_with_separators_is_documents_and_one_without_is_a_single_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One.\n<|endoftext|>\nTwo\nlines.\n<|endoftext|>\n", encoding="utf-8")
    assert read_documents(str(path), "train", "k") == ["One.", "Two\nlines."]
    path.write_text("All of it.\n\nAs it is.\n", encoding="utf-8")
    assert read_documents(str(path), "train", "k") == ["All of it.\n\nAs it is.\n"]


def test_documents_start_with_one_bos_each(tokenizer: object) -> None:
    streams = tokenize(["abc", "  ", "def"], tokenizer, "documents", "k")
    assert len(streams) == 2
    assert all(ids[0] == 1 and 1 not in ids[1:] for ids in streams)


def test_a_tokenizer_that_does_not_know_the_text_is_refused_with_counts() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "known": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    stranger = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(DataError, match=r"3 of 4 tokens \(75.0%\) are <unk>"):
        tokenize(["known but not this"], stranger, "packed", "data.source")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikitxt2", "Did you mean 'wikitext2'"),
        ("missing/file.txt", "neither a file nor one of builtin, wikitext2, c4"),
    ],
)
def test_an_unknown_source_gets_the_nearest_name(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_documents(source, "train", "data.source")


def test_unreadable_files_say_which_and_why(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv ends in '\.csv'"):
        read_documents(str(tmp_path / "a.csv"), "train", "data.source")
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="no column 'text'; columns are body"):
        read_documents(str(tmp_path / "b.jsonl"), "train", "data.source")
    (tmp_path / "c.jsonl").write_text("no json\n")
    with pytest.raises(DataError, match=r"c\.jsonl cannot be read as jsonl"):
        read_documents(str(tmp_path / "c.jsonl"), "train", "data.source")
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        read_documents(str(tmp_path / "d.txt"), "train", "data.source")


def test_a_data_set_that_cannot_be_reached_names_itself_and_the_local_file_key() -> None:
    with pytest.raises(DataError, match=r"(?s)'wikitext2'.*--data\.eval_source path/to/text\.jsonl"):
        read_documents("wikitext2", "eval", "data.eval_source")


def windows(path: Path, tokenizer: object, **arguments: object) -> TextWindows:
    defaults = {"n_samples": 6, "seq_len": 32, "batch_size": 2}
    data = TextWindows(source=str(path), eval_source=str(path), **{**defaults, **arguments})  # type: ignore[arg-type]
    data.read(tokenizer, "hash", "fit")
    return data


def test_calibration_windows_are_distinct_cuts_of_the_stream_decided_by_the_seed(
    text_file: Path, tokenizer: object
) -> None:
    first, again, other = (windows(text_file, tokenizer, seed=s) for s in (0, 0, 1))
    assert first.calibration_ids().shape == (6, 32)
    assert torch.equal(first.calibration_ids(), again.calibration_ids())
    assert not torch.equal(first.calibration_ids(), other.calibration_ids())
    assert len({tuple(row.tolist()) for row in first.calibration_ids()}) == 6
    assert first.calibration_digest == again.calibration_digest != other.calibration_digest


def test_fewer_windows_than_asked_are_an_error_with_both_numbers(text_file: Path, tokenizer: object) -> None:
    with pytest.raises(DataError, match=r"\d+ windows of 32; data.n_samples asks for 100000"):
        windows(text_file, tokenizer, n_samples=100000)


def test_packed_windows_do_not_overlap_and_drop_the_tail(text_file: Path, tokenizer: object) -> None:
    data = windows(text_file, tokenizer, eval_protocol="packed")
    assert data.evaluation is not None
    stream = tokenize(read_documents(str(text_file), "eval", "k"), tokenizer, "packed", "k")[0]
    assert len(data.evaluation) == len(stream) // 32
    cut = {tuple(w.tolist()) for w in data.evaluation.windows}
    assert tuple(stream[32:64]) in cut
    assert data.protocol.n_tokens == len(stream) // 32 * 31


def test_document_windows_start_with_bos_and_are_cut(text_file: Path, tokenizer: object) -> None:
    data = windows(text_file, tokenizer, eval_protocol="documents", eval_seq_len=50)
    assert data.evaluation is not None
    assert len(data.evaluation) == 40
    assert all(w[0] == 1 and len(w) <= 50 for w in data.evaluation.windows)
    assert data.protocol.bos is True


def test_padding_is_on_the_right_and_not_predicted() -> None:
    batch = pad_windows([{"input_ids": torch.tensor([5, 6, 7])}, {"input_ids": torch.tensor([8])}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, IGNORED, IGNORED]]


@pytest.mark.parametrize("key", ["n_samples", "seq_len", "batch_size"])
def test_sizes_below_one_are_refused(key: str) -> None:
    with pytest.raises(DataError, match=f"data.{key} \\(0\\)"):
        TextWindows(**{key: 0})


def write_parquet(path: Path, values: list[Any], kind: Any) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": pa.array(values, kind)}), path)
    return path


def test_bytes_are_read_as_utf8(tmp_path: Path) -> None:
    import pyarrow as pa

    path = write_parquet(tmp_path / "a.parquet", ["café".encode(), None, b"b"], pa.binary())
    assert read_documents(str(path), "train", "k") == ["café", "b"]
    path = write_parquet(tmp_path / "b.parquet", [b"a", b"caf\xe9"], pa.binary())
    with pytest.raises(DataError, match=r"b\.parquet: the text of row 2 is not UTF-8"):
        read_documents(str(path), "train", "k")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([{"role": "user", "content": "hi"}], "a list of messages.*apply_chat_template"),
        ([1], "a list,"),
        ({"content": "hi"}, "a mapping,"),
        (3, "a number,"),
        (True, "true or false,"),
        ("\ud800", "is not UTF-8"),
    ],
)
def test_rows_that_are_no_text_are_refused_with_line_and_type(value: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n\n" + json.dumps({"text": value}) + "\n")
    with pytest.raises(DataError, match=f"line 3 .*{said}"):
        read_documents(str(path), "train", "k")


def test_rows_of_other_types_in_parquet_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    path = write_parquet(tmp_path / "a.parquet", [None, 1], pa.timestamp("s"))
    with pytest.raises(DataError, match="row 2 is datetime, not text"):
        read_documents(str(path), "train", "k")


def test_a_text_that_looks_like_a_date_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "2020-01-01"}\n\n{"body": 1}\n')
    assert read_documents(str(tmp_path / "a.jsonl"), "train", "k") == ["2020-01-01"]


def test_a_name_with_brackets_is_a_name_and_a_long_line_is_fine(tmp_path: Path) -> None:
    (tmp_path / "setv.jsonl").write_text('{"text": "what a pattern would find"}\n')
    path = tmp_path / "set[v2].jsonl"
    path.write_text(json.dumps({"text": "a" * 2**20}))
    assert read_documents(str(path), "train", "k") == ["a" * 2**20]


def test_a_mark_in_front_is_no_text_and_line_ends_are_those_of_any_system(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff<|endoftext|>\r\nHello\r\nyou\r\n<|endoftext|>\r\nB".encode())
    assert read_documents(str(path), "train", "k") == ["Hello\nyou", "B"]


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("latin-1", r"not UTF-8 text.*at byte 3\). Convert"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-32", "UTF-16"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_other_encodings_are_refused_with_what_to_do(encoding: str, said: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes("café".encode(encoding))
    with pytest.raises(DataError, match=rf"k: .*{said}.*iconv"):
        read_documents(str(path), "train", "k")


def test_what_is_no_file_with_rows_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "list.jsonl").write_text('["a"]\n')
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and no more")
    for name, said in [
        ("pipe.txt", "a named pipe"),
        ("folder.jsonl", "a folder"),
        ("empty.jsonl", "holds no text"),
        ("list.jsonl", "line 1 holds a list"),
        ("no.parquet", "cannot be read as parquet"),
        ("x" * 300 + ".txt", "neither a file nor one of"),
        ("a\0b", "neither a file nor one of"),
    ]:
        with pytest.raises(DataError, match=f"data.source: .*{said}"):
            read_documents(str(tmp_path / name), "train", "data.source")


def test_a_token_that_the_model_has_no_embedding_for_is_named_only_where_it_occurs(
    text_file: Path, tokenizer: Any
) -> None:
    highest = max(max(w.tolist()) for w in windows(text_file, tokenizer).calibration_ids())
    data = TextWindows(source=str(text_file), eval_source=str(text_file), n_samples=6, seq_len=32)
    data.read(tokenizer, "hash", "fit", rows=len(tokenizer))
    data = TextWindows(source=str(text_file), eval_source=str(text_file), n_samples=6, seq_len=32)
    with pytest.raises(
        DataError, match=rf"data\.source: the tokenizer gives '.+' in this text the id \d+, .* {highest} rows"
    ):
        data.read(tokenizer, "hash", "fit", rows=highest)
