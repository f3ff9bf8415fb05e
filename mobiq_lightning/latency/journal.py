"""Keeps the rows that were measured, and writes them to disk after every measurement."""

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
        bits: Bits per weight that are read, or ``mixed`` if tokens differ; 0 for work that is no product.
        n_bytes: Bytes of the weights that one call reads, scales and biases included.
        calls: Calls that are timed in turn; they do the same work with different weights.
        launches: Least number of calls in one CUDA graph.
    """

    product: str
    bits: float | str
    n_bytes: int
    calls: list[Call]
    launches: int = 64


@dataclass
class Journal:
    """Collects measured rows and writes latency.json after each, so that a killed measurement loses none of them.

    Args:
        folder: Folder that latency.json is written to.
        path: Path that is measured, ``kernels`` or ``reference``.
        head: Entries of the file in front of the rows.
        clock: Clock that times the calls.
        deadline: Time after which nothing more is measured, in seconds of `time.monotonic`.
        copy_bytes_per_s: Measured copy bandwidth in bytes per second; 0 until it is known.
        rows: Rows that were measured so far.
        not_measured: Descriptions of what was left out for want of time.
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
        """The content of latency.json: the entries of the head, the path, the rows, and what was not measured."""
        return {**self.head, "path": self.path, "rows": self.rows, "not_measured": self.not_measured}

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - time.monotonic()

    def put(self, key: str, value: Any) -> None:
        """Sets an entry of the head, which stands in front of the rows, and writes the file."""
        self.head[key] = value
        self.save()

    def add(self, row: Row) -> None:
        """Adds a row and writes the file."""
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Writes all that is known so far into latency.json."""
        write_json(self.folder / RESULTS, self.content)

    def measure(self, section: str, shape: Shape, tokens: int, make: Callable[[], Candidate], label: str) -> None:
        """Times a product and adds its row; a product that fails adds a row with its error.

        After the deadline nothing is timed, and the product is listed as not measured.

        Args:
            section: Section that the row belongs to, such as ``decode``.
            shape: Shape of the weights.
            tokens: Number of tokens that are multiplied.
            make: Function that makes the product.
            label: Name of the product in case it cannot be made.

        Raises:
            RuntimeError: If the device does not work any more (a CUDA error).
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
        """Figures of a row: microseconds, bytes read, gigabytes per second, and their share of the copy bandwidth."""
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
    """The first row without an error whose entries equal those given by name, or None."""
    matching = (r for r in rows if "error" not in r and all(r.get(k) == v for k, v in wanted.items()))
    return next(matching, None)
