"""One of several processes that share a job ends, and the others notice by their connection."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer

from mobiq_lightning.errors import MobiqError

_BROKEN = re.compile(
    r"connection (was )?(reset|closed|refused)|broken pipe|remote (process|peer)|NCCL|heartbeat|timed out", re.I
)
"""What gloo and NCCL say when the other side is gone."""


@contextmanager
def lost_process(trainer: Trainer, how_it_goes_on: Callable[[], str]) -> Iterator[None]:
    """Within it, an error of the connection between the processes of a job is a `MobiqError` of a line.

    Args:
        trainer: Knows the processes.
        how_it_goes_on: Says what of the work is kept and how to go on.
    """
    try:
        yield
    except RuntimeError as error:  # torch's errors of distributed processes are all of this kind
        if trainer.world_size == 1 or not _BROKEN.search(str(error)):
            raise
        said = str(error).strip().splitlines()[0][:200]
        raise MobiqError(
            f"rank {trainer.global_rank} of {trainer.world_size} has lost another process of this run, which was killed or "
            f"failed ({said}); {how_it_goes_on()}"
        ) from error
