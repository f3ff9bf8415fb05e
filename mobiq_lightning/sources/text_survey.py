"""How much text there is, beside what a recipe asks for; nothing is cut, written or kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mobiq_lightning.errors import DataError
from mobiq_lightning.sources.windows import TextWindows


@dataclass(frozen=True)
class TextSurvey:
    """A source of text.

    Args:
        key: Recipe key that names it.
        source: The source.
        tokens: Tokens that it gives.
        highest_id: The highest token id in it; -1 without tokens.
        windows: Windows that it gives.
        asked: Windows that the recipe asks for; None for all.
        length: Tokens of a window.
    """

    key: str
    source: str
    tokens: int
    highest_id: int
    windows: int
    asked: int | None
    length: int


def survey(text: TextWindows, tokenizer: Any, tokenizer_hash: str, rows: int) -> tuple[list[TextSurvey], list[str]]:
    """Reads both sources of text with a tokenizer; the evaluation windows are there afterwards.

    Args:
        text: The windows of a recipe.
        tokenizer: Hugging Face tokenizer of the model.
        tokenizer_hash: Hash that identifies it.
        rows: Rows of the model's embedding.

    Returns:
        What each source gives, and what is wrong, a line each.
    """
    found: list[TextSurvey] = []
    problems: list[str] = []
    try:
        text.read(tokenizer, tokenizer_hash, "validate", rows=rows)
        assert text.evaluation is not None
        windows = text.evaluation.windows
        tokens, highest = sum(map(len, windows)), max(int(window.max()) for window in windows)
        asked = text.eval_max_windows
        found.append(
            TextSurvey("data.eval_source", text.eval_source, tokens, highest, len(windows), asked, text.eval_seq_len)
        )
    except DataError as error:
        problems.append(str(error))
    try:
        streams = text.streams(text.source, "train", "data.source", tokenizer, tokenizer_hash)
    except DataError as error:
        return found, [*problems, str(error)]
    tokens = sum(map(len, streams))
    highest = max((max(ids, default=-1) for ids in streams), default=-1)
    given = tokens // text.seq_len
    found.insert(0, TextSurvey("data.source", text.source, tokens, highest, given, text.n_samples, text.seq_len))
    if given < text.n_samples:
        problems.append(text.too_few(tokens))
    return found, problems
