"""The LightningDataModule: calibration windows and evaluation windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from mobiq_lightning.errors import DataError
from mobiq_lightning.runs import CalibrationText, EvalProtocol, SharedWork
from mobiq_lightning.sources.text import Protocol, Split, check_ids, describe_source, digest, read_documents, tokenize

IGNORED = -100
"""Label of positions that are not predicted: padding."""


Write = Callable[[int, int, int], list[int]]
"""Function that writes token ids from the least number of tokens, the tokens per document at most, and a seed."""


class ComparisonPass(IntEnum):
    """The passes of a comparison over the evaluation windows; each has a data loader, whose index is the value."""

    ROUTER = 0
    """Measures full precision, round-to-nearest and the router, and with it the bits that the router uses."""
    CONTROLS = 1
    """Measures the controls, which are given the bits that the router used in the first pass."""


class Windows(Dataset[dict[str, Tensor]]):
    """Token windows of equal or different length.

    Args:
        windows: Token ids of each window, (T,) int64.
    """

    def __init__(self, windows: list[Tensor]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "index": torch.tensor(index)}


class TextWindows(LightningDataModule):
    """Windows of text, for calibration and for evaluation.

    Args:
        source: Calibration text: `builtin`, `wikitext2`, `c4`, or a path to a .txt, .jsonl or .parquet file.
        eval_source: Evaluation text: `builtin`, `wikitext2`, `c4`, or a path to such a file.
        n_samples: Calibration windows of the text.
        seq_len: Tokens per window.
        batch_size: Calibration windows per step.
        eval_protocol: Way of cutting windows. `packed`: the papers' windows, without overlap, the tail dropped.
            `documents`: every document for itself, BOS in front, cut at the window. Calibration windows are cut from
            the same kind of stream.
        eval_seq_len: Tokens per evaluation window; by default `seq_len`.
        eval_batch_size: Evaluation windows per step; by default `batch_size`.
        eval_max_windows: Number of evaluation windows to use, the first ones; by default all.
        seed: Seed of the choice of calibration windows from the text, and of what the model writes.
        n_generated: Number of further calibration windows, which the full-precision model writes itself. Thresholds,
            guards and layer gains look at the windows of the text first.
    """

    def __init__(
        self,
        source: str = "builtin",
        eval_source: str = "builtin",
        n_samples: int = 128,
        seq_len: int = 2048,
        batch_size: int = 1,
        eval_protocol: Protocol = "packed",
        eval_seq_len: int | None = None,
        eval_batch_size: int | None = None,
        eval_max_windows: int | None = None,
        seed: int = 0,
        n_generated: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.eval_source = source, eval_source
        self.n_samples, self.seq_len, self.batch_size = n_samples, seq_len, batch_size
        self.eval_protocol: Protocol = eval_protocol
        self.eval_seq_len = seq_len if eval_seq_len is None else eval_seq_len
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.eval_max_windows = eval_max_windows
        self.seed, self.n_generated = seed, n_generated
        for key in ("n_samples", "seq_len", "batch_size", "eval_seq_len", "eval_batch_size", "eval_max_windows"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise DataError(f"data.{key} ({value}) must be at least 1")
        if n_generated < 0:
            raise DataError(f"data.n_generated ({n_generated}) must be at least 0")
        self.calibration: Windows | None = None
        self.evaluation: Windows | None = None
        self._protocol: EvalProtocol | None = None
        self.calibration_digest = ""
        self._rows: int | None = None
        self.shared = SharedWork(None)

    @property
    def protocol(self) -> EvalProtocol:
        """Protocol by which perplexity is measured on the evaluation text; it is known once the text is read."""
        assert self._protocol is not None, "read() comes first"
        return self._protocol

    def read(
        self,
        tokenizer: Any,
        tokenizer_hash: str,
        stage: str,
        shared: SharedWork | None = None,
        write: Write | None = None,
        rows: int | None = None,
    ) -> None:
        """Reads and tokenizes the text; the model's own tokenizer is needed, so the model calls this in its `setup`.

        Args:
            tokenizer: Hugging Face tokenizer of the model.
            tokenizer_hash: Hash that identifies the tokenizer in results.
            stage: Stage of the trainer: ``fit`` reads both sources, any other the evaluation source alone.
            shared: Store in which runs on the same text leave its tokens for each other.
            write: Function that writes the windows of `n_generated`; not needed without them.
            rows: Rows of the model's embedding, which no token that occurs may reach; None if it is not known.

        Raises:
            DataError: If a source cannot be read, has tokens that the model does not know, or gives fewer windows than
                asked for.
        """
        self._rows = rows
        self.shared = shared or self.shared
        reads = stage == "fit" and self.calibration is None
        windows = self._read_calibration(tokenizer, tokenizer_hash) if reads else []
        if self.evaluation is None:
            self.evaluation = self._read_evaluation(tokenizer, tokenizer_hash)
        if reads:  # writing takes long, so it comes when all that may be wrong with the text is known
            windows += self._written(write) if self.n_generated else []
            self.calibration_digest = digest([w.tolist() for w in windows])
            self.calibration = Windows(windows)

    def calibration_ids(self) -> Tensor:
        """Gives the token ids (N, T) int64 of all N calibration windows, in the order of their index."""
        assert self.calibration is not None, "read() comes first"
        return torch.stack(self.calibration.windows)

    @property
    def n_windows(self) -> int:
        """Calibration windows, of the text and written by the model."""
        return self.n_samples + self.n_generated

    def n_eval_batches(self, world_size: int = 1) -> int:
        """Batches of evaluation windows of one process, as far as can be told: before the text is read, by the most windows."""
        windows = (self.eval_max_windows or 0) if self.evaluation is None else len(self.evaluation)
        return math.ceil(math.ceil(windows / world_size) / self.eval_batch_size)

    @property
    def eval_fill(self) -> float:
        """The part of the evaluation windows that is text, as far as is known; documents may be shorter than a window."""
        if self.evaluation is None:
            return 1.0
        tokens = sum(len(window) for window in self.evaluation.windows)
        return tokens / (len(self.evaluation) * self.eval_seq_len)

    def _read_calibration(self, tokenizer: Any, tokenizer_hash: str) -> list[Tensor]:
        key = "data.source"
        streams = self.streams(self.source, "train", key, tokenizer, tokenizer_hash)
        stream = [token for ids in streams for token in ids]
        found = len(stream) // self.seq_len
        if found < self.n_samples:
            raise DataError(self.too_few(len(stream)))
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(found, generator=generator)[: self.n_samples].tolist()
        return [torch.tensor(stream[i * self.seq_len : (i + 1) * self.seq_len]) for i in chosen]

    def _written(self, write: Write | None) -> list[Tensor]:
        """Windows that the model writes."""
        assert write is not None, "data.n_generated needs something that writes"
        n_tokens = self.n_generated * self.seq_len
        return list(torch.tensor(write(n_tokens, self.seq_len, self.seed)[:n_tokens]).split(self.seq_len))

    def too_few(self, n_tokens: int) -> str:
        """What is said of calibration text of so many tokens that gives fewer windows than asked for."""
        return (
            f"data.source: {self.source} gives {n_tokens} tokens, {n_tokens // self.seq_len} windows of {self.seq_len}; "
            f"data.n_samples asks for {self.n_samples}. Give more text, or lower data.n_samples or data.seq_len"
        )

    def streams(self, source: str, split: Split, key: str, tokenizer: Any, tokenizer_hash: str) -> list[list[int]]:
        """Reads and tokenizes a source.

        Args:
            source: The source.
            split: Part of a named source.
            key: Recipe key that names it, for messages.
            tokenizer: Hugging Face tokenizer of the model.
            tokenizer_hash: Hash that identifies it.

        Returns:
            Token ids, one list per stream.

        Raises:
            DataError: If it cannot be read, or has tokens that the model does not know.
        """

        def make() -> list[list[int]]:
            return tokenize(read_documents(source, split, key), tokenizer, self.eval_protocol, key)

        described = {**describe_source(source, split), "tokenizer": tokenizer_hash, "protocol": self.eval_protocol}
        streams = self.shared.tokens(described, make)
        if self._rows is not None:
            check_ids(streams, tokenizer, self._rows, key)
        return streams

    def _read_evaluation(self, tokenizer: Any, tokenizer_hash: str) -> Windows:
        key = "data.eval_source"
        streams = self.streams(self.eval_source, "eval", key, tokenizer, tokenizer_hash)
        if self.eval_protocol == "packed":
            stream, size = streams[0], self.eval_seq_len
            cut = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
        else:
            cut = [ids[: self.eval_seq_len] for ids in streams if len(ids) > 1]
        if not cut:
            raise DataError(
                f"{key}: {self.eval_source} gives {sum(map(len, streams))} tokens, not one window of "
                f"{self.eval_seq_len}. Give more text or lower data.eval_seq_len"
            )
        cut = cut[: self.eval_max_windows]
        self._protocol = EvalProtocol(
            eval_protocol=self.eval_protocol,
            window=self.eval_seq_len,
            n_windows=len(cut),
            bos=tokenizer.bos_token_id is not None and all(w[0] == tokenizer.bos_token_id for w in cut),
            tokenizer=tokenizer_hash,
            data=self.eval_source,
            data_hash=digest(cut),
            n_tokens=sum(len(w) - 1 for w in cut),
            calibration=CalibrationText(
                data=self.source,
                n_samples=self.n_samples,
                n_generated=self.n_generated,
                seq_len=self.seq_len,
                seed=self.seed,
            ),
        )
        # Windows of similar length share a batch, so that little of it is padding.
        return Windows([torch.tensor(w) for w in sorted(cut, key=len)])

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Loads calibration windows ``{"input_ids": (B, T), "index": (B,)}``, shuffled anew each epoch by `seed`."""
        assert self.calibration is not None, "read() comes first"
        world, rank = _world()
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.calibration, num_replicas=world, rank=rank, shuffle=True, seed=self.seed
        )
        return DataLoader(self.calibration, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """Makes one data loader of the evaluation windows for each `ComparisonPass`.

        During a fit there are no loaders: perplexity of a half-calibrated model means nothing.
        """
        if self.trainer is not None and self.trainer.state.fn == "fit":
            return []
        assert self.evaluation is not None, "read() comes first"
        world, rank = _world()
        # A DistributedSampler would repeat windows to even out the ranks, and count them twice.
        share = Subset(self.evaluation, range(rank, len(self.evaluation), world))
        return [DataLoader(share, batch_size=self.eval_batch_size, collate_fn=pad_windows) for _ in ComparisonPass]


def pad_windows(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Joins windows to one batch, padded on the right, where a causal model cannot see it.

    Args:
        items: Windows of ``input_ids`` (T,) each, of equal or different length.

    Returns:
        ``input_ids`` (B, T) and ``labels`` (B, T) int64, the latter `IGNORED` where padded.
    """
    windows = [item["input_ids"] for item in items]
    length = max(len(w) for w in windows)
    ids = torch.zeros(len(windows), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window
        labels[row, : len(window)] = window
    return {"input_ids": ids, "labels": labels}


def _world() -> tuple[int, int]:
    """Number of processes and the rank of this one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
