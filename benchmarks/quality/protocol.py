"""The text and the measure that all rows share: the project's own windows and its own perplexity."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from mobiq_lightning.evaluation.metrics import Perplexity, log_probabilities
from mobiq_lightning.runs import SharedWork
from mobiq_lightning.sources import IGNORED, Source, SourceWriter, TextWindows, load_source, pad_windows


@dataclass(frozen=True)
class Protocol:
    """What every row of one table has in common.

    Args:
        model: Folder, hub id or `builtin`.
        source: Calibration text.
        eval_source: Evaluation text.
        n_samples: Calibration windows.
        seq_len: Tokens per calibration window.
        eval_seq_len: Tokens per evaluation window.
        eval_max_windows: Evaluation windows; by default all.
        n_generated: Further calibration windows, which the model writes itself.
    """

    model: str = "builtin"
    source: str = "builtin"
    eval_source: str = "builtin"
    n_samples: int = 128
    seq_len: int = 128
    eval_seq_len: int = 256
    eval_max_windows: int | None = 128
    n_generated: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load(self) -> Source:
        """The model in full precision, in the dtype that peers are given: float32."""
        return load_source(self.model, "float32")

    def read(self, source: Source, seed: int, stage: str = "fit") -> TextWindows:
        """The windows that a calibration with `seed` takes, and those of the evaluation."""
        data = TextWindows(
            source=self.source,
            eval_source=self.eval_source,
            n_samples=self.n_samples,
            seq_len=self.seq_len,
            batch_size=8,
            eval_protocol="documents",
            eval_seq_len=self.eval_seq_len,
            eval_batch_size=16,
            eval_max_windows=self.eval_max_windows,
            seed=seed,
            n_generated=self.n_generated,
        )
        writer = SourceWriter(source, torch.device("cpu"), SharedWork(None))
        data.read(source.tokenizer, source.tokenizer_hash, stage, write=writer.write)
        return data


@torch.no_grad()
def measure_perplexity(model: Any, data: TextWindows) -> float:
    """Of the evaluation windows, counted as `Comparison` counts it."""
    assert data.evaluation is not None
    metric = Perplexity()
    for batch in DataLoader(data.evaluation, batch_size=data.eval_batch_size, collate_fn=pad_windows):
        scored, wanted = batch["labels"][:, 1:] != IGNORED, batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        metric.update(log_probabilities(logits[scored]), wanted[scored])
    return float(metric.compute())
