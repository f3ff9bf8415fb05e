# python -m benchmarks.scaling.watch RECIPE.yaml OUT.json
"""Runs one `fit` in this process and writes what each of its phases took at its peak, and how long.

Of the operating system (Linux): `VmHWM`, the peak of resident memory, which is set back where a phase begins; and, looked at
every few milliseconds, `RssAnon` and `RssShmem`, the memory that nothing but the process holds. The difference are pages of files
that are mapped, most of all weights of the source model: they count as resident, but a system that needs room takes them back.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
EVERY = 0.01


class Watch:
    """Peaks of memory, and seconds, by the name of the phase."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.name, self.since = "start", time.monotonic()
        self._private, self._ends = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def begin(self, name: str) -> None:
        """Ends the current phase, and begins or goes on with another."""
        self._private = max(self._private, _private())
        row = self.found.setdefault(self.name, {"peak": 0, "private": 0, "seconds": 0.0})
        row["peak"] = max(row["peak"], _status()["VmHWM"])
        row["private"] = max(row["private"], self._private)
        row["seconds"] += time.monotonic() - self.since
        PEAK.write_text("5")
        self.name, self.since, self._private = name, time.monotonic(), 0

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Phase `name` within another."""
        outer = self.name
        self.begin(name)
        try:
            yield
        finally:
            self.begin(outer)

    def end(self) -> dict[str, dict[str, float]]:
        """Ends the last phase."""
        self.begin("end")
        self._ends.set()
        return self.found

    def _look(self) -> None:
        while not self._ends.wait(EVERY):
            self._private = max(self._private, _private())


def _status() -> dict[str, int]:
    """Bytes of this process, by their name in /proc."""
    lines = (line.split() for line in STATUS.read_text(encoding="utf-8").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _private() -> int:
    now = _status()
    return now["RssAnon"] + now["RssShmem"]


def _wrapped(watch: Watch, owner: Any, name: str, phase: str) -> None:
    inner: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **named: Any) -> Any:
        with watch.within(phase):
            return inner(*args, **named)

    setattr(owner, name, wrapper)


def main() -> None:
    recipe, to = sys.argv[1:3]
    import mobiq_lightning
    from mobiq_lightning.calibration import module as calibration
    from mobiq_lightning.calibration.planning import plan, start
    from mobiq_lightning.callbacks import LayerGains, LayerwiseCalibration, ThresholdTuning
    from mobiq_lightning.jobs import cli
    from mobiq_lightning.sources import SourceWriter

    plan._SOON = math.inf  # no step is measured: that takes longer than the run
    watch = Watch()
    _wrapped(watch, calibration, "load_source", "loading")
    _wrapped(watch, calibration, "read_text", "reading text")
    _wrapped(watch, SourceWriter, "write", "text writing")
    _wrapped(watch, start, "plan_run", "planning")
    _wrapped(watch, LayerGains, "measure", "layer gains")
    _wrapped(watch, ThresholdTuning, "tune", "thresholds")
    _wrapped(watch, cli, "finish_checkpoint", "export")
    begins = LayerwiseCalibration.on_train_epoch_start

    def epoch(self: Any, trainer: Any, module: Any) -> None:
        watch.begin("model stages" if module.block_index is None else "block stages")
        begins(self, trainer, module)

    LayerwiseCalibration.on_train_epoch_start = epoch  # type: ignore[method-assign]
    validates = calibration.ElasticCalibration.on_validation_start

    def compares(self: Any) -> None:
        watch.begin("comparison")
        validates(self)

    calibration.ElasticCalibration.on_validation_start = compares  # type: ignore[method-assign]
    mobiq_lightning.fit(recipe)
    Path(to).write_text(json.dumps(watch.end(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
