"""The text and the measure that all rows share: the project's own windows and its own perplexity."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from mobiq_lightning.evaluation.metrics import KLDivergence, Perplexity, log_probabilities
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
        eval_protocol: How the evaluation text is cut into windows: `documents` or `packed`.
    """

    model: str = "builtin"
    source: str = "builtin"
    eval_source: str = "builtin"
    n_samples: int = 128
    seq_len: int = 128
    eval_seq_len: int = 256
    eval_max_windows: int | None = 128
    n_generated: int = 0
    eval_protocol: Literal["documents", "packed"] = "documents"

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
            eval_protocol=self.eval_protocol,
            eval_seq_len=self.eval_seq_len,
            eval_batch_size=16 if self.eval_protocol == "documents" else 1,
            eval_max_windows=self.eval_max_windows,
            seed=seed,
            n_generated=self.n_generated,
        )
        writer = SourceWriter(source, torch.device("cpu"), SharedWork(None))
        data.read(source.tokenizer, source.tokenizer_hash, stage, write=writer.write)
        return data


@torch.no_grad()
def measure_quality(model: Any, data: TextWindows, full: Any) -> tuple[float, float]:
    """Perplexity, and KL divergence from full precision in nats per token, of the evaluation windows, as `Comparison` counts.

    Args:
        model: What is measured.
        data: Holds the windows.
        full: The model in full precision.
    """
    assert data.evaluation is not None
    perplexity, divergence = Perplexity(), KLDivergence()
    for batch in DataLoader(data.evaluation, batch_size=data.eval_batch_size, collate_fn=pad_windows):
        scored, wanted = batch["labels"][:, 1:] != IGNORED, batch["labels"][:, 1:]
        given = {"input_ids": batch["input_ids"], "use_cache": False}
        found = log_probabilities(model(**given).logits[:, :-1][scored])
        perplexity.update(found, wanted[scored])
        if full is not model:
            divergence.update(found, log_probabilities(full(**given).logits[:, :-1][scored]))
    return float(perplexity.compute()), 0.0 if full is model else float(divergence.compute())
