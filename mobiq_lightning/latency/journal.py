"""What was measured, on disk after every measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobiq_lightning.files import write_json
from mobiq_lightning.latency.shapes import Shape
from mobiq_lightning.latency.timing import Call, Clock, Timing

RESULTS, PLOT = "latency.json", "latency.png"
Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A product that can be timed.

    Args:
        product: ``plain`` for full-precision weights, ``elastic`` for sliced ones, or the name of another way.
        bits: Of the weights, or ``mixed`` if tokens differ; 0 for work that is no product.
        n_bytes: Read of the weights by one call, scales and biases included.
        calls: The same with other weights.
        launches: Calls in one CUDA graph, at least.
    """

    product: str
    bits: float | str
    n_bytes: int
    calls: list[Call]
    launches: int = 64


@dataclass
class Journal:
    """Collects rows and writes them into `RESULTS` after each: what is killed loses nothing that was measured.

    Args:
        folder: Where to.
        path: ``kernels`` or ``reference``: what is measured.
        head: What else is known before the first row.
        clock: Times the calls.
        deadline: When to stop, by `time.monotonic`.
        copy_bytes_per_s: Measured copy bandwidth; 0 until it is known.
    """

    folder: Path
    path: str
    head: dict[str, Any]
    clock: Clock
    deadline: float
    copy_bytes_per_s: float = 0.0
    rows: list[Row] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)

    @property
    def content(self) -> dict[str, Any]:
        """As it is written."""
        return {**self.head, "path": self.path, "rows": self.rows, "not_measured": self.not_measured}

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    def put(self, key: str, value: Any) -> None:
        """Adds to what stands in front of the rows."""
        self.head[key] = value
        self.save()

    def add(self, row: Row) -> None:
        """Adds a row."""
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Writes what is known so far."""
        write_json(self.folder / RESULTS, self.content)

    def measure(self, section: str, shape: Shape, tokens: int, make: Callable[[], Candidate], label: str) -> None:
        """Times a product and adds its row; one that fails adds a row with its error, one that is too late a note.

        Args:
            section: Of the row.
            shape: Of the weights.
            tokens: That are multiplied.
            make: Makes what is timed.
            label: What it is called if it cannot be made.

        Raises:
            RuntimeError: If the device does not work any more.
        """
        where = {"section": section, "path": self.path, "shape": shape.name, "rows": shape.rows}
        where |= {"columns": shape.in_features, "tokens": tokens}
        if self.seconds_left <= 0:
            self.not_measured.append(f"{section} {shape.name}, {tokens} tokens: {label} (out of time)")
            self.save()
            return
        try:
            candidate = make()
            timing = self.clock.time(candidate.calls, candidate.launches)
        except Exception as error:  # a variant that does not run here must not cost the others
            if "CUDA error" in str(error):
                raise
            text = f"{type(error).__name__}: {str(error)[:300]}"
            self.add({**where, "product": label, "error": text})
            return
        beside = self._beside_plain(where, timing) if candidate.bits else {}
        self.add({**where, **self.figures(candidate, timing), **beside})

    def figures(self, candidate: Candidate, timing: Timing) -> Row:
        """Of a row: time, traffic, and both beside the copy bandwidth."""
        rate = candidate.n_bytes / (timing.us * 1e-6)
        return {
            "product": candidate.product,
            "bits": candidate.bits,
            "us": timing.us,
            "spread": timing.spread,
            "bytes": candidate.n_bytes,
            "gb_per_s": rate / 1e9,
            "of_copy": rate / self.copy_bytes_per_s if self.copy_bytes_per_s else None,
        }

    def _beside_plain(self, where: Row, timing: Timing) -> Row:
        plain = find(self.rows, product="plain", **where)
        return {"times_plain": plain["us"] / timing.us} if plain else {}


def find(rows: list[Row], /, **wanted: Any) -> Row | None:
    """The first row without an error whose entries are as wanted."""
    matching = (r for r in rows if "error" not in r and all(r.get(k) == v for k, v in wanted.items()))
    return next(matching, None)
