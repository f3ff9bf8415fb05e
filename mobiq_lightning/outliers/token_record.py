"""Records what a model predicts at every token when all of them read one depth, for several depths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from mobiq_lightning.nn import RoutedInput, fixed_depth, full_precision
from mobiq_lightning.outliers.input_errors import InputErrors
from mobiq_lightning.sources import IGNORED, Windows, pad_windows

_CHUNK = 1024  # tokens whose next-token distributions are held in float64 at once


@dataclass
class TokenRecord:
    """Figures of N tokens, each of which predicts the next, at P precisions.

    Args:
        bits: The P precisions, as depths in bits.
        windows: (N,) number of the window that each token is in.
        positions: (N,) position of each token in its window.
        ids: (N,) id of each token.
        full_nll: (N,) negative log-likelihood of the next token in full precision, in nats.
        nll: (P, N) negative log-likelihood of the next token at each precision, in nats.
        kl: (P, N) ``KL(full precision || precision)`` of the next-token distributions, in nats.
        inputs: Relative errors (P, N) of each input's linears on full-precision inputs, by name of its first linear.
    """

    bits: tuple[int, ...]
    windows: Tensor
    positions: Tensor
    ids: Tensor
    full_nll: Tensor
    nll: Tensor
    kl: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def compared(self) -> Tensor:
        """Which tokens (N,) bool are compared between precisions: all but the first of each window.

        That one has no context, and where it is BOS it would be the same measurement once per window.
        """
        return self.positions > 0


def spread_windows(evaluation: Windows, batch_size: int, max_windows: int | None) -> DataLoader[dict[str, Tensor]]:
    """Loads batches of evaluation windows: all, or some spread evenly over them, since they are sorted by length.

    Args:
        evaluation: The evaluation windows.
        batch_size: Windows per batch.
        max_windows: Most windows that are loaded, or None for all.
    """
    n_windows = len(evaluation)
    count = min(max_windows or n_windows, n_windows)
    chosen = [i * n_windows // count for i in range(count)]
    return DataLoader(Subset(evaluation, chosen), batch_size=batch_size, collate_fn=pad_windows)


@torch.no_grad()
def read_uniformly(
    full: Any,
    rounded: Sequence[RoutedInput],
    model: Any,
    inputs: Sequence[RoutedInput],
    batches: Iterable[dict[str, Tensor]],
    bits: Sequence[int],
    watched: InputErrors | None = None,
) -> TokenRecord:
    """Reads a text in full precision and at each depth, all tokens alike, and records the errors of every token.

    Args:
        full: The source model.
        rounded: Routed inputs of the source model, which are set to full precision.
        model: The model that is read at fixed depths; it may be the source model itself.
        inputs: Routed inputs of that model.
        batches: Batches of ``input_ids`` and ``labels`` (B, T), the latter `IGNORED` where padded.
        bits: Depths in bits.
        watched: Measurement of the errors at the inputs of linears, which is made as well; or None.
    """
    parts, window = [], 0
    for batch in batches:
        device = next(full.parameters()).device
        ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        counted = labels[:, 1:] != IGNORED
        wanted = labels[:, 1:][counted][:, None]
        with full_precision(rounded), nullcontext() if watched is None else watched.watch(counted):
            # In float64: at 8 bits the divergence of a token is smaller than what float32 loses in a logarithm.
            reference = _logits(full, ids, counted).double().log_softmax(-1)
        figures = [-reference.gather(1, wanted)[:, 0].float().cpu()]
        for depth in bits:
            with fixed_depth(inputs, depth):
                figures += _compare(reference, _logits(model, ids, counted), wanted)
        place = [axis.cpu() for axis in counted.nonzero(as_tuple=True)]
        parts.append([place[0] + window, place[1], ids[:, :-1][counted].cpu(), *figures])
        window += len(ids)
    windows, positions, tokens, full_nll, *rest = (torch.cat(column) for column in zip(*parts, strict=True))
    errors = watched.errors() if watched is not None else {}
    kl, nll = torch.stack(rest[::2]), torch.stack(rest[1::2])
    return TokenRecord(tuple(bits), windows, positions, tokens, full_nll, nll, kl, errors)


def _logits(model: nn.Module, ids: Tensor, counted: Tensor) -> Tensor:
    """Logits (N, V) of the N tokens that count."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1][counted]
    return logits


def _compare(reference: Tensor, logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence (N,) and negative log-likelihood (N,), float32 on the CPU.

    Args:
        reference: (N, V) float64 log-probabilities in full precision.
        logits: (N, V) of the model.
        wanted: (N, 1) the next tokens.
    """
    kl, nll = [], []
    for expected, found, token in zip(*(t.split(_CHUNK) for t in (reference, logits, wanted)), strict=True):
        log_probs = found.double().log_softmax(-1)
        kl.append((expected.exp() * (expected - log_probs)).sum(-1))
        nll.append(-log_probs.gather(1, token)[:, 0])
    return torch.cat(kl).float().cpu(), torch.cat(nll).float().cpu()
