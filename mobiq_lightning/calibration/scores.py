"""The scores that routers give to windows of text, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from mobiq_lightning.calibration.sliced_source import SlicedSource
from mobiq_lightning.nn import record_scores

BATCH = 4
"""Windows that go through a block at once."""


@torch.no_grad()
def scores_of(sliced: SlicedSource, input_ids: Tensor) -> list[Tensor]:
    """For each input of the model, the scores (N * T, S - 1) of windows (N, T), each block run at its present setting."""
    batches = list(sliced.caller.embed_all(input_ids).split(BATCH))
    with record_scores(sliced.all_inputs()) as records:
        for block in range(len(sliced.blocks)):
            batches = _through(sliced, block, batches)
    return [torch.cat(record) for record in records]


@torch.no_grad()
def block_scores_of(sliced: SlicedSource, block: int, hidden: Tensor) -> list[Tensor]:
    """For each input of one block, the scores (N * T, S - 1) of what enters the block, (N, T, H), at its present setting."""
    with record_scores(sliced.block_at(block).routed_inputs()) as records:
        _through(sliced, block, list(hidden.split(BATCH)))
    return [torch.cat(record) for record in records]


def _through(sliced: SlicedSource, block: int, batches: list[Tensor]) -> list[Tensor]:
    passed = []
    for number, batch in enumerate(batches):
        for router in sliced.block_at(block).routers():
            router.reseed(-1 - number)
        passed.append(sliced.caller.call(block, batch))
    return passed
