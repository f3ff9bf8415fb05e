"""What is done about something that a guard has noticed: it is said, noted, and mended where the recipe asks for that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mobiq_lightning.calibration.guarding.fallback import State
from mobiq_lightning.calibration.guarding.guard import Guard, Sighting
from mobiq_lightning.console import say
from mobiq_lightning.errors import GuardError
from mobiq_lightning.runs import GuardEvent, sentence

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration


def act_on(module: ElasticCalibration, guard: Guard[Any], sightings: Sequence[Sighting], before: State | None) -> bool:
    """Notes what a guard has noticed, says it, and does what the recipe asks for.

    Args:
        module: The calibration, at the end of a visit.
        guard: The guard that has noticed it.
        sightings: What it has noticed.
        before: What the blocks had learned before the current stage of the whole model, if it is known.

    Returns:
        Whether anything was noticed.

    Raises:
        GuardError: If the recipe says stop.
    """
    action = guard.action
    if not sightings or action == "off":
        return False
    if action == "repair" and not guard.can_repair(module, before):
        action = "record"
    events = [
        GuardEvent(guard.name, module.block_index, s.input, action, module.current_epoch, s.depth, s.value, s.limit)
        for s in sightings
    ]
    said = [sentence(event, module.schedule.n_epochs) for event in events]
    if action == "stop":
        raise GuardError(
            "\n".join(said)
            + f"\n{guard.advice}, and start again with --overwrite. Or set `{guard.name}` of the callback "
            "Guards in trainer.callbacks to repair or record: then the same command goes on here; finished blocks are kept"
        )
    for event, line in zip(events, said, strict=True):
        say(line)
        module.record.note_guard(replace(event, value=_finite(event.value), limit=_finite(event.limit)))
    if action == "repair":
        guard.repair(module, before)
    return True


def _finite(value: float | None) -> float | None:
    """A value as JSON has it: None if it is not finite."""
    return None if value is None or not math.isfinite(value) else value
