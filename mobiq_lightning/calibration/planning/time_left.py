"""How long a run still takes: its phases, what a step of each is expected to take, and what those that were seen have taken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

FIXED = "fixed"
"""Kind of phases that take the time that they are given."""


@dataclass(frozen=True)
class Phase:
    """A part of a run that is made of steps of one cost.

    Args:
        name: What it is called.
        kind: Phases of one kind are slower or faster than expected together: ``block``, ``model``, ``forward`` or ``comparison``;
            those of kind ``fixed`` take what they are given.
        steps: Steps that it has.
        seconds: What one step is expected to take.
        late: Whether it comes when the checkpoint is written.
    """

    name: str
    kind: str
    steps: int
    seconds: float
    late: bool = False


@dataclass
class _Seen:
    """What was seen of a phase: steps that are done, and the seconds that the timed ones of them took."""

    done: int = 0
    timed: int = 0
    seconds: float = 0.0


class TimeLeft:
    """Estimates the seconds that are left of a run.

    A phase of which steps were timed goes on at the pace that they had. One that was not seen yet is expected to take what was
    expected of it, times how much longer than expected the phases of its kind took, or all phases if none of its kind was seen.

    Args:
        phases: The phases of the run, in their order.
    """

    def __init__(self, phases: Iterable[Phase]) -> None:
        self.phases = {phase.name: phase for phase in phases}
        self._seen = {name: _Seen() for name in self.phases}

    def note(self, name: str, done: int, seconds: float, of: int | None = None) -> None:
        """Notes that a phase has gone on.

        Args:
            name: The phase; one that was not expected is added.
            done: Steps of it that are done by now.
            seconds: What the steps since the last note took.
            of: Steps that it has, if that is known better now.
        """
        if name not in self.phases:
            self.phases[name], self._seen[name] = Phase(name, name, of or done, 0.0), _Seen()
        phase = self.phases[name]
        if of is not None and of != phase.steps:  # the same work, in steps of another size
            self.phases[name] = replace(phase, steps=of, seconds=phase.seconds * phase.steps / max(of, 1))
        seen = self._seen[name]
        seen.timed += max(0, done - seen.done)
        seen.seconds += seconds
        seen.done = max(done, seen.done)

    def skip(self, name: str, done: int) -> None:
        """Notes steps that were done before, as by a run that is resumed: they are not left, and nobody has timed them."""
        if name in self._seen:
            self._seen[name].done = max(done, self._seen[name].done)

    def steps(self, name: str) -> int:
        """Steps of a phase; 0 if it was not expected."""
        return self.phases[name].steps if name in self.phases else 0

    def end(self, name: str) -> None:
        """Notes that nothing of a phase is left, however many steps it had."""
        if name in self._seen:
            self._seen[name].done = max(self.phases[name].steps, self._seen[name].done)

    def left(self, name: str | None = None) -> float:
        """Seconds that are left of a phase, or of the run."""
        if name is None:
            return sum(self.left(phase) for phase in self.phases)
        return max(0, self.phases[name].steps - self._seen[name].done) * self._pace(name)

    @property
    def spent(self) -> float:
        """Seconds that were noted."""
        return sum(seen.seconds for seen in self._seen.values())

    @property
    def total(self) -> float:
        """Seconds that the whole run takes, of which a resumed one has spent some before."""
        return self.left() + sum(
            max(seen.done - seen.timed, 0) * self._pace(name) + seen.seconds for name, seen in self._seen.items()
        )

    def _pace(self, name: str) -> float:
        """Seconds of a step of a phase."""
        phase, seen = self.phases[name], self._seen[name]
        if seen.timed:
            return seen.seconds / seen.timed
        if phase.kind == FIXED:
            return phase.seconds
        return phase.seconds * (self._slowness(phase.kind) or self._slowness() or 1.0)

    def _slowness(self, kind: str | None = None) -> float | None:
        """How many times longer than expected the steps of a kind, or all, took; None if none was timed."""
        pairs = [
            (seen.seconds, seen.timed * self.phases[name].seconds)
            for name, seen in self._seen.items()
            if seen.timed and (kind is None or self.phases[name].kind == kind)
        ]
        expected = sum(pair[1] for pair in pairs)
        return sum(pair[0] for pair in pairs) / expected if expected > 0 else None
