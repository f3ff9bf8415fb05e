"""Text sources: what a recipe may name, and how it becomes documents and tokens.

No other module imports `datasets`.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mobiq_lightning.errors import DataError, nearest
from mobiq_lightning.sources.text_files import check_kind, find_file, read_file, texts_of

Split = Literal["train", "eval"]
Protocol = Literal["packed", "documents"]

_UNKNOWN_LIMIT = 0.01  # share of <unk> tokens above which the tokenizer is taken to be the wrong one


@dataclass(frozen=True)
class HubText:
    """Place of a data set on the Hugging Face hub.

    Args:
        path: Repository of the data set.
        name: Configuration of the data set; None if it has none.
        split: Split of the data set.
        data_files: Files of the repository to read; None for all.
    """

    path: str
    name: str | None
    split: str
    data_files: str | None = None


_HUB: dict[str, dict[Split, HubText]] = {
    "wikitext2": {
        "train": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        "eval": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    },
    "c4": {
        "train": HubText("allenai/c4", None, "train", "en/c4-train.00000-of-01024.json.gz"),
        "eval": HubText("allenai/c4", None, "train", "en/c4-validation.00000-of-00008.json.gz"),
    },
}
NAMES = ("builtin", *_HUB)


def read_documents(source: str, split: Split, key: str) -> list[str]:
    """Reads the documents of a text source.

    Args:
        source: Source of the text: ``builtin``, ``wikitext2``, ``c4``, or a path to a .txt, .jsonl or .parquet file in
            UTF-8. Documents are rows of jsonl and parquet (their ``text``), or the parts of a .txt between lines
            ``<|endoftext|>``.
        split: Part of a named source, ``train`` or ``eval``; a path is read whole.
        key: Recipe key that names the source, for messages.

    Raises:
        DataError: If the source is unknown, cannot be reached, holds no text, or something else where text is expected.
    """
    if source == "builtin":
        from mobiq_lightning.sources.builtin_text import builtin_documents

        return builtin_documents("train" if split == "train" else "heldout")
    if source in _HUB:
        return _read_hub(source, _HUB[source][split], key)
    documents = read_file(check_source(source, key), key)
    if not any(d.strip() for d in documents):
        raise DataError(f"{key}: {source} holds no text")
    return documents


def check_source(source: str, key: str) -> Path:
    """Makes sure that a source can be one: a name, or a file of a kind that can be read.

    Args:
        source: Source of the text.
        key: Recipe key that names it, for messages.

    Returns:
        The file; for a name, a path of that name.

    Raises:
        DataError: If it is neither.
    """
    if source in NAMES:
        return Path(source)
    path = find_file(source)
    if path is None:
        hint = nearest(source, NAMES)
        raise DataError(f"{key}: {source!r} is neither a file nor one of {', '.join(NAMES)}. {hint}".rstrip())
    check_kind(path, key)
    return path


def describe_source(source: str, split: Split) -> dict[str, Any]:
    """Describes what the text of a source depends on, as far as can be told without reading it, for use as a key."""
    described: dict[str, Any] = {"source": source, "split": split}
    path = None if source in NAMES else find_file(source)
    if source == "builtin":
        described["python"] = sys.version
    elif path is not None:
        stat = path.stat()
        described |= {"path": str(path.resolve()), "bytes": stat.st_size, "modified": stat.st_mtime_ns}
    return described


def _read_hub(source: str, hub: HubText, key: str) -> list[str]:
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(hub.path, hub.name, data_files=hub.data_files, split=hub.split)
    except Exception as error:
        raise DataError(
            f"{key}: data set {source!r} ({hub.path}) is neither in the local cache nor reachable on the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0][:160]}). Give a local file instead: "
            f"--{key} path/to/text.jsonl (.txt and .parquet work too); no other data set is used in its place."
        ) from error
    return _text_column(rows, f"{key}: {source}")


def _text_column(rows: Any, where: str) -> list[str]:
    if "text" not in rows.column_names:
        raise DataError(f"{where} has no column 'text'; columns are {', '.join(rows.column_names)}")
    return texts_of(rows["text"], where)


def tokenize(documents: list[str], tokenizer: Any, protocol: Protocol, where: str) -> list[list[int]]:
    """Turns documents into token ids.

    Args:
        documents: Texts of the documents.
        tokenizer: Hugging Face tokenizer.
        protocol: Way of joining documents. ``packed``: one stream, the documents joined by blank lines as the papers
            do, with whatever the tokenizer itself puts in front. ``documents``: each for itself, with BOS in front.
        where: Recipe key that names the source, for messages.

    Returns:
        One list of ids per stream: one for ``packed``, one per document for ``documents``.

    Raises:
        DataError: If more than 1 % of the tokens are unknown to the tokenizer.
    """
    if protocol == "packed":
        streams = [list(tokenizer("\n\n".join(documents), verbose=False)["input_ids"])]
    else:
        encoded = tokenizer([d for d in documents if d.strip()], add_special_tokens=False, verbose=False)["input_ids"]
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        streams = [bos + list(ids) for ids in encoded]
    unknown = tokenizer.unk_token_id
    total = sum(len(ids) for ids in streams)
    n_unknown = 0 if unknown is None else sum(ids.count(unknown) for ids in streams)
    if n_unknown > _UNKNOWN_LIMIT * total:
        raise DataError(
            f"{where}: {n_unknown} of {total} tokens ({n_unknown / total:.1%}) are {tokenizer.unk_token}; "
            "the tokenizer does not fit this text. Give text in the model's language, or the model's own tokenizer"
        )
    return streams


def check_ids(streams: list[list[int]], tokenizer: Any, rows: int, where: str) -> None:
    """Checks that the model has an embedding for every token that occurs.

    Args:
        streams: Token ids.
        tokenizer: Hugging Face tokenizer that gave them.
        rows: Rows of the model's embedding.
        where: Recipe key that names the source of the text, for messages.

    Raises:
        DataError: If a token's id reaches the size of the embedding.
    """
    highest = max((max(ids, default=-1) for ids in streams), default=-1)
    if highest >= rows:
        raise DataError(
            f"{where}: the tokenizer gives {tokenizer.convert_ids_to_tokens(highest)!r} in this text the id {highest}, but the "
            f"model's embedding has {rows} rows. Give text without that token, or the tokenizer that belongs to the model"
        )


def digest(streams: list[list[int]]) -> str:
    """Computes the SHA-256 (first 16 hex digits) of token ids, which identifies data and tokenizer together."""
    sha = hashlib.sha256()
    for ids in streams:
        sha.update(",".join(map(str, ids)).encode() + b"\n")
    return sha.hexdigest()[:16]
