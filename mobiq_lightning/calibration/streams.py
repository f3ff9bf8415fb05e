"""The input streams of a sweep: how calibration windows read the blocks that they have passed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from mobiq_lightning.calibration.block_batch import ROUTED
from mobiq_lightning.calibration.hidden_states import Reading, eval_mode
from mobiq_lightning.calibration.schedule import Stage
from mobiq_lightning.calibration.sliced_source import SlicedSource
from mobiq_lightning.nn import fixed_depth, full_precision, meet_budget


def streams_of(
    sliced: SlicedSource, stages: Sequence[Stage], depths: Sequence[int], final_bits: float
) -> dict[str, Reading]:
    """How each input stream that the stages of a sweep need reads a block, by the name of the stream.

    Args:
        sliced: The model being calibrated.
        stages: The stages of the sweep.
        depths: Depths of the objective, in bits, which stages read that name none.
        final_bits: The average bits at which routed blocks feed the next one.
    """
    read = {d for stage in stages for d in (depths if stage.depths is None else stage.depths)}
    streams: dict[str, Reading] = {}
    if any(stage.trains("routers") for stage in stages):
        streams[ROUTED] = _read_routed(sliced, final_bits)
    return streams | {str(depth): _read_at(sliced, depth) for depth in sorted(read)}


def read_full(sliced: SlicedSource) -> Reading:
    """How the targets read a block: in full precision."""

    def read(block: int, batch: int) -> AbstractContextManager[Any]:
        return full_precision(sliced.block_at(block).routed_inputs())

    return read


def _read_at(sliced: SlicedSource, depth: int) -> Reading:
    def read(block: int, batch: int) -> AbstractContextManager[Any]:
        return fixed_depth(sliced.block_at(block).routed_inputs(), depth)

    return read


def _read_routed(sliced: SlicedSource, final_bits: float) -> Reading:
    @contextmanager
    def read(block: int, batch: int) -> Iterator[None]:
        calibrated = sliced.block_at(block)
        for router in calibrated.routers():
            router.reseed(-1 - batch)
        with eval_mode(calibrated.routers()), meet_budget(calibrated.routed_inputs(), final_bits):
            yield

    return read
