"""When guards look at what: the depths that are calibrated, and the blocks at which the whole model is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration

QUARTERS = 4
"""How often the whole model is measured while its blocks are calibrated, one after the other."""


def depths_to_look_at(module: ElasticCalibration) -> tuple[list[int], list[int]]:
    """Depths, in bits, that are calibrated at the end of the current visit, and those of them to compare with rounding.

    When nothing moves the codes any more, these are all depths. Before that, those that were trained; and of a block that was
    trained as a part of the whole model before, only those that this visit has trained, since the others owe the block nothing.
    """
    schedule, segment, all_depths = module.schedule, module.segment, module.sliced.block_at(0).routed_inputs()[0].depths
    objective = module.objective.depths if segment.block is not None else module.model_objective.depths

    def trained(segments: Sequence[Any]) -> set[int]:
        return {
            depth
            for s in segments
            if not s.stage.trains_routers_alone
            for depth in ((s.stage.depth,) if s.stage.depth else objective)
        }

    so_far = [
        s for s in schedule.segments if s.epochs.start <= module.current_epoch and s.block in (segment.block, None)
    ]
    looked_at = trained(so_far)
    block = 0 if segment.block is None else segment.block
    if schedule.final_epoch(block) == module.current_epoch:
        looked_at = set(all_depths)
    mixed = segment.block is not None and any(s.block is None and not s.stage.trains_routers_alone for s in so_far)
    compared = trained([s for s in so_far if s.visit == segment.visit]) if mixed else looked_at
    return sorted(looked_at), sorted(compared)


def ends_quarter(block: int, n_blocks: int) -> bool:
    """Whether a quarter of the blocks is done with this one, by index; of four or fewer blocks each ends one."""
    return QUARTERS * (block + 1) // n_blocks > QUARTERS * block // n_blocks
