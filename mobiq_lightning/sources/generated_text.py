"""Calibration text that the full-precision model writes itself, which needs no data set.

LLM-QAT (arXiv 2305.17888) distils a model on text of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mobiq_lightning.errors import DataError, ModelError
from mobiq_lightning.nn import HostTensors
from mobiq_lightning.runs import SharedWork
from mobiq_lightning.sources.model import Source

CPU_CACHE_BYTES = 2**30
"""Bytes for keys and values of documents written at a time, on a CPU; a GPU gives half of what weights leave."""
Tell = Callable[[int, int, bool], None]
"""Function that is told the tokens that are written by now, those that are to be written, and whether the last ones were
written just now or before."""


@dataclass
class SourceWriter:
    """Writes documents with a source model: sampled at temperature 1 from its own distribution, from BOS to EOS.

    Documents are written many at a time, and each batch is kept when it is done, so that an interrupted run goes on after
    it and finds the same text.

    Args:
        source: The full-precision model; it is moved to `device` while it writes.
        device: Device that the model writes on.
        kept: Store of the batches that are done.
        tell: Function that is told how much is written.
    """

    source: Source
    device: torch.device
    kept: SharedWork
    tell: Tell | None = None

    def write(self, n_tokens: int, seq_len: int, seed: int) -> list[int]:
        """Writes documents and gives their token ids, one document after the other, without EOS.

        Args:
            n_tokens: Least number of tokens to write.
            seq_len: Greatest number of tokens of a document; the model's own limit if that is lower.
            seed: Seed that decides the text.

        Raises:
            DataError: If the tokenizer has neither BOS nor EOS to begin with, or the model ends its texts at once.
            ModelError: If the model does not fit on the device, or gives logits that are not finite.
        """
        model, tokenizer = self.source.model, self.source.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise DataError(
                f"data.n_generated: the tokenizer of {self.source.name} has neither BOS nor EOS, so the model has nothing to "
                "begin a text with. Set data.n_generated to 0 and give more text in data.source"
            )
        length = min(seq_len, getattr(model.config, "max_position_embeddings", None) or seq_len)
        at_once = self._rows_at_once(length)
        key: dict[str, Any] = {
            "source": self.source.fingerprint,
            "tokenizer": self.source.tokenizer_hash,
            "dtype": str(model.dtype),
        }
        key |= {"length": length, "seed": seed}
        host = HostTensors(model)
        progress = _Progress(n_tokens, self.tell)
        written: list[int] = []
        n_documents = 0
        try:
            while len(written) < n_tokens:
                of_document = len(written) / n_documents if n_documents else length
                if of_document < 2:
                    raise DataError(
                        f"data.n_generated: {self.source.name} ends its texts at once: {n_documents} of them have "
                        f"{len(written)} tokens. Set data.n_generated to 0 and give more text in data.source"
                    )
                rows = min(at_once, math.ceil(1.1 * (n_tokens - len(written)) / of_document) + 1)
                progress.begin_batch(len(written), rows * of_document / length)
                batch_key = {"written by": key, "after": n_documents, "rows": rows}
                make = partial(self._documents, first, rows, length, 1_000_003 * seed + n_documents, progress)
                written += [token for document in self.kept.tokens(batch_key, make) for token in document]
                n_documents += rows
        finally:
            host.put_back()
        return written

    @torch.no_grad()
    def _documents(self, first: int, rows: int, length: int, seed: int, progress: _Progress) -> list[list[int]]:
        """Token ids of `rows` documents, cut before EOS."""
        model, eos = self.source.model.to(self.device), self.source.tokenizer.eos_token_id
        sampling = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_length=length,
            eos_token_id=eos, pad_token_id=first if eos is None else eos,
        )  # fmt: skip
        begin = torch.full((rows, 1), first, device=self.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            ids: Tensor = model.generate(
                begin,
                attention_mask=torch.ones_like(begin),
                generation_config=sampling,
                stopping_criteria=StoppingCriteriaList([progress]),
                logits_processor=LogitsProcessorList([_Finite(self.source.name, str(model.dtype))]),
            )
        return [_until(document, eos) for document in ids.tolist()]

    def _rows_at_once(self, length: int) -> int:
        """Number of documents whose keys and values fit into memory at a time, at least one.

        Raises:
            ModelError: If the model and the keys and values that it keeps do not fit on a GPU.
        """
        config, model = self.source.model.config, self.source.model
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        of_row = 2 * config.num_hidden_layers * heads * width * length * model.dtype.itemsize
        room = CPU_CACHE_BYTES
        if self.device.type == "cuda":
            weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.device != self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            room = (total - weights) // 2  # of all memory: what is free may differ when a run goes on
            if free - weights < max(room, of_row):
                needed = max(room, of_row)
                raise ModelError(
                    f"data.n_generated: {self.source.name} takes {weights / 1e9:.1f} GB, and what it keeps of the texts that it "
                    f"writes {needed / 1e9:.1f} GB; on {self.device} {free / 1e9:.1f} GB are free. Set data.n_generated to 0, or "
                    "use a larger device"
                )
        return max(1, int(room // of_row))  # a large model on a CPU writes one after the other


class _Progress(StoppingCriteria):
    """A stopping criterion that stops nothing, but tells how much is written."""

    def __init__(self, n_tokens: int, tell: Tell | None) -> None:
        self.n_tokens, self.tell = n_tokens, tell

    def begin_batch(self, written: int, rows: float) -> None:
        """Notes the tokens written before a batch, and how many documents of full length the batch amounts to."""
        self.written, self.rows = written, rows
        if self.tell is not None:
            self.tell(min(written, self.n_tokens), self.n_tokens, False)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if self.tell is not None:
            self.tell(min(self.written + int(self.rows * input_ids.shape[1]), self.n_tokens), self.n_tokens, True)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Finite(LogitsProcessor):
    """A logits processor that changes nothing, but refuses logits that nothing can be sampled from."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name, self.dtype = name, dtype.removeprefix("torch.")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = scores.isnan() | (scores == torch.inf)
        if bool(bad.any()):
            raise ModelError(
                f"data.n_generated: {self.name} gives {int(bad.sum())} of {scores.numel()} logits that are NaN or infinite in "
                f"{self.dtype}, at token {input_ids.shape[1] + 1} of its own text. Use model.dtype bfloat16 or float32"
            )
        return scores


def _until(document: list[int], eos: int | None) -> list[int]:
    return document[: document.index(eos, 1)] if eos in document[1:] else document
