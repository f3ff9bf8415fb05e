"""What a peer is, and what its wrapper is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.nn import BlockLayout
from mobiq_lightning.sources import Source

from .protocol import Protocol

ANY_BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass
class Task:
    """One model to quantize, asymmetric, weights only, the linears of the decoder blocks alone.

    Args:
        source: The model in float32, which the wrapper may change, with its tokenizer.
        calibration: (N, T) int64, the tokens that every calibrated peer is given.
        bits: Per weight.
        group_size: Columns that share one range.
        seed: Of the windows, and of what the peer draws.
        protocol: Where model and text come from.
        scratch: An empty folder.
    """

    source: Source
    calibration: Tensor
    bits: int
    group_size: int
    seed: int
    protocol: Protocol
    scratch: Path

    @property
    def model(self) -> Any:
        return self.source.model

    def linears(self, model: nn.Module | None = None) -> Iterator[tuple[str, nn.Linear]]:
        """The linears to quantize, by their name in the model."""
        layout = BlockLayout()
        for name, module in (model or self.model).named_modules():
            if name.startswith(f"{layout.blocks}.") and isinstance(module, nn.Linear):
                yield name, module

    def batches(self, size: int = 8) -> list[dict[str, Tensor]]:
        """The calibration windows as models take them."""
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in self.calibration.split(size)]


@dataclass(frozen=True)
class Peer:
    """A way to quantize.

    Args:
        name: As tables call it.
        run: Gives the quantized model: an ordinary one in float32 that holds dequantized weights.
        package: Its distribution on the package index; None for what is here.
        setting: In words.
        calibrated: Whether it depends on the calibration tokens; if not, one seed stands for all.
        bits: What it offers.
        ours: Whether it is this project's.
        on_grid: Whether a group holds at most 2^bits values; not where factors on channels are folded in afterwards.
        variables: Environment of its process.
    """

    name: str
    run: Callable[[Task], Any]
    package: str | None
    setting: str
    calibrated: bool = True
    bits: tuple[int, ...] = ANY_BITS
    ours: bool = False
    on_grid: bool = True
    variables: tuple[tuple[str, str], ...] = ()


def set_weight(linear: Any, weight: Tensor) -> None:
    """Puts dequantized values into a linear; packages leave inference tensors and other dtypes behind."""
    if tuple(weight.shape) != tuple(linear.weight.shape):
        raise ValueError(f"dequantized weight has shape {tuple(weight.shape)}, the linear {tuple(linear.weight.shape)}")
    linear.weight = nn.Parameter(weight.detach().clone().float(), requires_grad=False)


@torch.no_grad()
def most_levels(weight: Tensor, group_size: int) -> int:
    """Different values in the group of a weight (O, I) that has the most of them; b bits give 2^b."""
    ordered = weight.unflatten(1, (-1, group_size)).sort(-1).values
    return int((ordered.diff(dim=-1) != 0).sum(-1).max()) + 1


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Within it, the working directory is `folder`: for packages that write files wherever they are run."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
