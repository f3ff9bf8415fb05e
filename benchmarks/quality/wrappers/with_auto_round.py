"""AutoRound: rounding and ranges learned block by block with signed gradients; and the AWQ that comes with it."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..peer import Peer, Task


def run(task: Task, **settings: Any) -> Any:
    from auto_round import AutoRound

    quantizer = AutoRound(
        task.model,
        task.source.tokenizer,
        bits=task.bits,
        group_size=task.group_size,
        sym=False,
        dataset=task.batches(1),
        nsamples=len(task.calibration),
        seqlen=task.calibration.shape[1],
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,  # a minute of compiling for every row
        seed=42 + task.seed,
        **{"amp": False, **settings},  # bfloat16 else
    )
    model, _ = quantizer.quantize()
    return model


PEERS = [
    Peer("AutoRound", partial(run, iters=200), "auto-round", "200 iterations a block"),
    Peer(
        "AutoRound, bfloat16", partial(run, iters=200, amp=True), "auto-round", "200 iterations a block, its autocast"
    ),
    Peer("AutoRound, 1000", partial(run, iters=1000), "auto-round", "1000 iterations a block"),
    Peer("AWQ (auto-round)", partial(run, algorithm="awq"), "auto-round", "its defaults, rounding to nearest"),
]
