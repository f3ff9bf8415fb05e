"""Writes what a study of outliers found: outliers.json, outliers.csv with every token, and outliers.png."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from mobiq_lightning.files import write_atomically, write_json, write_text
from mobiq_lightning.outliers.figure import plot_outliers
from mobiq_lightning.outliers.token_record import TokenRecord
from mobiq_lightning.runs import OUTLIERS, OUTLIERS_PLOT, OUTLIERS_TABLE


def write_outliers(found: dict[str, Any], record: TokenRecord, tokenizer: Any, folder: Path) -> None:
    """Writes outliers.json, outliers.csv and outliers.png into a run folder, each atomically.

    Args:
        found: Figures that become outliers.json.
        record: Errors of every token, read by the elastic checkpoint.
        tokenizer: Tokenizer of the model, which names the tokens.
        folder: The run folder.
    """
    write_json(folder / OUTLIERS, found)
    write_text(folder / OUTLIERS_TABLE, _token_table(record, tokenizer))
    write_atomically(folder / OUTLIERS_PLOT, lambda path: plot_outliers(found, record, path))


def _token_table(record: TokenRecord, tokenizer: Any) -> str:
    """A line for each token: where it is, what it is, what it costs in full precision, and its KL at each precision."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["window", "position", "token", "full_nll", *(f"kl_at_{b}_bits" for b in record.bits)])
    names = tokenizer.convert_ids_to_tokens(record.ids.tolist())
    place = zip(record.windows.tolist(), record.positions.tolist(), names, strict=True)
    for where, nll, kl in zip(place, record.full_nll.tolist(), record.kl.T.tolist(), strict=True):
        writer.writerow([*where, f"{nll:.4g}", *(f"{value:.4g}" for value in kl)])
    return text.getvalue()


def overlap_metrics(tokens: dict[str, Any]) -> dict[str, float]:
    """The overlaps and rank correlations that `summarize_tokens` returned, as scalars for loggers by name."""
    metrics: dict[str, float] = {}
    for place in ("model", "inputs_mean"):
        for figure in ("overlap", "rank_correlation"):
            found = tokens[place].get(figure, {})  # there is none of inputs if weights were rotated
            metrics |= {f"outliers/{place}/{figure}_{pair}": value for pair, value in found.items()}
    return metrics
