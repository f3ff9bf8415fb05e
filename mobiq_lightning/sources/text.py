"""Text sources: what a recipe may name, and how it becomes documents and tokens.

No other module imports `datasets`.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mobiq_lightning.errors import DataError, nearest

Split = Literal["train", "eval"]
Protocol = Literal["packed", "documents"]

_SEPARATOR = re.compile(r"^\s*<\|endoftext\|>\s*$", re.MULTILINE)
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
        source: Source of the text: ``builtin``, ``wikitext2``, ``c4``, or a path to a .txt, .jsonl or .parquet file.
            Documents are rows of jsonl and parquet (their ``text``), or the parts of a .txt between lines
            ``<|endoftext|>``.
        split: Part of a named source, ``train`` or ``eval``; a path is read whole.
        key: Recipe key that names the source, for messages.

    Raises:
        DataError: If the source is unknown, cannot be reached or holds no text.
    """
    if source == "builtin":
        from mobiq_lightning.sources.builtin_text import builtin_documents

        return builtin_documents("train" if split == "train" else "heldout")
    if source in _HUB:
        return _read_hub(source, _HUB[source][split], key)
    path = Path(source).expanduser()
    if not path.is_file():
        hint = nearest(source, NAMES)
        raise DataError(f"{key}: {source!r} is neither a file nor one of {', '.join(NAMES)}. {hint}".rstrip())
    if path.suffix not in (".txt", ".jsonl", ".parquet"):
        raise DataError(f"{key}: {path.name} ends in {path.suffix!r}; .txt, .jsonl and .parquet can be read")
    if path.suffix == ".txt":
        documents = _SEPARATOR.split(path.read_text(encoding="utf-8"))
        # A text without separators is one document and stays as it is, to the last newline.
        documents = [d.strip("\n") for d in documents] if len(documents) > 1 else documents
        documents = [d for d in documents if d.strip()]
    else:
        documents = _read_rows(path, key)
    if not any(d.strip() for d in documents):
        raise DataError(f"{key}: {source} holds no text")
    return documents


def describe_source(source: str, split: Split) -> dict[str, Any]:
    """Describes what the text of a source depends on, as far as can be told without reading it, for use as a key."""
    described: dict[str, Any] = {"source": source, "split": split}
    path = Path(source).expanduser()
    if source == "builtin":
        described["python"] = sys.version
    elif source not in _HUB and path.is_file():
        stat = path.stat()
        described |= {"path": str(path.resolve()), "bytes": stat.st_size, "modified": stat.st_mtime_ns}
    return described


def _read_rows(path: Path, key: str) -> list[str]:
    from datasets import load_dataset

    kind = "json" if path.suffix == ".jsonl" else "parquet"
    try:
        rows: Any = load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:
        raise DataError(f"{key}: {path} cannot be read as {path.suffix[1:]}: {error}") from error
    return _text_column(rows, f"{key}: {path}")


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
    return [str(text) for text in rows["text"] if text is not None]


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


def digest(streams: list[list[int]]) -> str:
    """Computes the SHA-256 (first 16 hex digits) of token ids, which identifies data and tokenizer together."""
    sha = hashlib.sha256()
    for ids in streams:
        sha.update(",".join(map(str, ids)).encode() + b"\n")
    return sha.hexdigest()[:16]
