"""Counts what routers do with a text: depths per input, bits by token position and by token, over all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from mobiq_lightning.runs import ClassUse

_EDGES = (1, 2, 3, *(2**power for power in range(2, 24)))
"""Where classes of positions begin after the first, which is 0: classes hold one position up to 3, then they double."""


class RoutingUse(Metric):
    """Metric of how deep tokens read the weights of each input, and of the bits read by position and by token id.

    Bits by position and by token id are means over inputs, weighted by the number of weights that read each input.

    Args:
        sizes: Number of weights that read each input.
        depths: Depths in bits that a token can read, ascending.
        vocabulary: Number of token ids.
    """

    full_state_update = False
    read: Tensor
    position_bits: Tensor
    position_count: Tensor
    token_bits: Tensor
    token_count: Tensor

    def __init__(self, sizes: Sequence[int], depths: Sequence[int], vocabulary: int) -> None:
        super().__init__()
        self.shares = torch.tensor(list(sizes), dtype=torch.float64) / sum(sizes)
        self.depths = torch.tensor(list(depths), dtype=torch.float64)
        self.edges = torch.tensor(_EDGES)
        counts = {"read": (len(sizes), len(depths)), "position_count": (len(_EDGES) + 1,), "token_count": (vocabulary,)}
        for name, shape in counts.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        for name, size in (("position_bits", len(_EDGES) + 1), ("token_bits", vocabulary)):
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, bits: Sequence[Tensor], ids: Tensor, mask: Tensor) -> None:
        """Adds the tokens of a batch.

        Args:
            bits: For each input, (B, T) code bits that each token read of its weights.
            ids: (B, T) token ids; a token's column is its position in the window.
            mask: (B, T) bool, which tokens count.
        """
        device = mask.device
        kept = torch.stack([values.reshape(mask.shape)[mask] for values in bits]).double()
        reached = torch.bucketize(kept, self.depths.to(device))
        self.read += torch.stack([torch.bincount(row, minlength=len(self.depths)) for row in reached])
        mean = self.shares.to(device) @ kept
        columns = torch.arange(mask.shape[1], device=device).expand(mask.shape)[mask]
        classes = torch.bucketize(columns, self.edges.to(device), right=True)
        self._add("position", classes, mean)
        self._add("token", ids[mask], mean)

    def compute(self) -> dict[str, Tensor]:
        """All sums by name: token counts ``read`` (inputs, depths), and bits and counts by position and by token id.

        The latter are ``position_bits`` and ``position_count`` (classes,), ``token_bits`` and ``token_count``
        (vocabulary,).
        """
        return {name: getattr(self, name) for name in self._defaults}

    def _add(self, kind: str, index: Tensor, bits: Tensor) -> None:
        total, count = getattr(self, f"{kind}_bits"), getattr(self, f"{kind}_count")
        total += torch.bincount(index, weights=bits, minlength=len(total))
        count += torch.bincount(index, minlength=len(count))


def use_by_position(sums: dict[str, Tensor]) -> list[ClassUse]:
    """Mean bits that tokens read, by their position in the window.

    Args:
        sums: Sums that `RoutingUse.compute` returned.

    Returns:
        Classes of positions that have tokens: 0, 1, 2 and 3 alone, then in classes that double.
    """
    starts = (0, *_EDGES)
    return _classes(
        sums["position_bits"], sums["position_count"], [_span(a, b) for a, b in zip(starts, _EDGES, strict=False)]
    )


def use_by_frequency(sums: dict[str, Tensor]) -> list[ClassUse]:
    """Mean bits that tokens read, by how often they occur in the text.

    Args:
        sums: Sums that `RoutingUse.compute` returned.

    Returns:
        Classes of numbers of occurrences that have tokens; they double: 1, 2-3, 4-7, ...
    """
    seen = sums["token_count"] > 0
    counts = sums["token_count"][seen]
    powers = torch.frexp(counts.double()).exponent.long() - 1
    classes = int(powers.max()) + 1 if len(powers) else 0
    bits = torch.zeros(classes, dtype=torch.float64, device=counts.device).index_add_(
        0, powers, sums["token_bits"][seen]
    )
    tokens = torch.zeros_like(counts[:1]).expand(classes).clone().index_add_(0, powers, counts)
    return _classes(bits, tokens, [_span(2**power, 2 ** (power + 1)) for power in range(classes)])


def _span(first: int, end: int) -> str:
    return f"{first}" if end == first + 1 else f"{first}-{end - 1}"


def _classes(bits: Tensor, tokens: Tensor, names: Sequence[str]) -> list[ClassUse]:
    """The classes that have tokens."""
    rows = zip(names, bits.tolist(), tokens.tolist(), strict=False)
    return [ClassUse(name, count, total / count) for name, total, count in rows if count]
