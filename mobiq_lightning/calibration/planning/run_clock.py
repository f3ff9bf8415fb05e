"""The clock of a run: whoever works tells it of steps, and whoever shows progress asks it what is left."""

from __future__ import annotations

import time
from collections.abc import Callable

from mobiq_lightning.calibration.planning.time_left import TimeLeft

Shown = Callable[[str, int, int], None]
"""Function that shows progress, from the name of a phase, the steps that are done, and those that it has."""


class RunClock:
    """Takes the times of the steps of a run.

    Args:
        left: What is left of the run.
        now: Function that tells the time in seconds.
    """

    def __init__(self, left: TimeLeft, now: Callable[[], float] = time.monotonic) -> None:
        self.left, self._now = left, now
        self._last = now()
        self.show: Shown | None = None

    def restart(self) -> None:
        """Forgets the time since the last step, which belongs to no phase."""
        self._last = self._now()

    def step(self, name: str, done: int, of: int) -> None:
        """Notes that so many steps of a phase are done, and shows it.

        Args:
            name: The phase.
            done: Steps that are done by now.
            of: Steps that it has.
        """
        now = self._now()
        self.left.note(name, done, now - self._last, of)
        self._last = now
        if self.show is not None:
            self.show(name, done, of)

    def skip(self, name: str, done: int, of: int) -> None:
        """Notes steps of a phase that were done before; nobody has timed them.

        Args:
            name: The phase.
            done: Steps that are done by now.
            of: Steps that it has.
        """
        self.left.note(name, 0, 0.0, of)
        self.left.skip(name, done)
        self.restart()

    def end(self, name: str) -> None:
        """Notes that nothing of a phase is left."""
        self.left.end(name)
        self.restart()
