"""The scores that routers give to windows of text, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mobiq_lightning.nn import record_scores

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration


BATCH = 4
"""Windows that go through a block at once."""


@torch.no_grad()
def scores_of(module: ElasticCalibration, input_ids: Tensor) -> list[Tensor]:
    """For each input of the model, the scores (N * T, S - 1) of windows (N, T), each block run at its present setting."""
    batches = list(module.caller.embed_all(input_ids).split(BATCH))
    with record_scores(module.all_inputs()) as records:
        for block in range(len(module.blocks)):
            batches = _through(module, block, batches)
    return [torch.cat(record) for record in records]


@torch.no_grad()
def block_scores_of(module: ElasticCalibration, block: int, hidden: Tensor) -> list[Tensor]:
    """The same for the inputs of one block, from its inputs (N, T, H)."""
    with record_scores(module.block_at(block).routed_inputs()) as records:
        _through(module, block, list(hidden.split(BATCH)))
    return [torch.cat(record) for record in records]


def _through(module: ElasticCalibration, block: int, batches: list[Tensor]) -> list[Tensor]:
    passed = []
    for number, batch in enumerate(batches):
        for router in module.block_at(block).routers():
            router.reseed(-1 - number)
        passed.append(module.caller.call(block, batch))
    return passed
