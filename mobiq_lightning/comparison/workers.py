"""Runs the cells of a comparison, several at a time, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from mobiq_lightning.comparison.file_names import LOGS, RECIPES
from mobiq_lightning.comparison.grid import Cell
from mobiq_lightning.console import say
from mobiq_lightning.environment import format_seconds
from mobiq_lightning.files import write_text

_POLL_SECONDS = 0.2
_NEWS_SECONDS = 30.0
"""Seconds after which the latest line of a running cell's log is printed."""


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    slot: int
    started: float = field(default_factory=time.monotonic)
    quoted: float = field(default_factory=time.monotonic)


class Workers:
    """Runs cells in slots, several at a time; slots take GPUs in turn, or share the cores of a CPU.

    Args:
        root: Folder of the comparison; recipes and logs of the cells go there.
        count: Number of slots.
        devices: Indices of the GPUs, dealt out to the slots in turn; empty for the CPU.
    """

    def __init__(self, root: Path, count: int, devices: Sequence[str] = ()) -> None:
        self.root, self.count, self.devices = root, count, list(devices)
        self.running: list[_Running] = []

    def run(self, cells: Sequence[Cell], finished: Callable[[Cell, str], Any]) -> None:
        """Runs cells until all have ended, and prints how each ended.

        Args:
            cells: Cells that are still to be run.
            finished: Function called after each cell with the reason why it failed, or an empty string.
        """
        waiting, done, started = list(cells), 0, time.monotonic()
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.count:
                    self.running.append(self._start(waiting.pop(0)))
                time.sleep(_POLL_SECONDS)
                for one in [r for r in self.running if r.process.poll() is not None]:
                    self.running.remove(one)
                    one.log.close()
                    done += 1
                    reason = "" if one.process.returncode == 0 else self._reason(one)
                    finished(one.cell, reason)
                    left = (time.monotonic() - started) / done * (len(cells) - done)
                    outcome = f"FAILED: {reason}" if reason else f"finished in {time.monotonic() - one.started:.0f} s"
                    say(
                        f"[{done}/{len(cells)}] {one.cell.name} {outcome}"
                        + (f"; ETA {format_seconds(left)}" if left else "")
                    )
                self._quote()
        finally:
            for one in self.running:
                one.process.kill()
                one.process.wait()
                one.log.close()
            self.running.clear()

    def log_of(self, cell: Cell) -> Path:
        """The log file that a cell's output goes to."""
        return self.root / LOGS / f"{cell.slug}.log"

    def recipe_of(self, cell: Cell) -> Path:
        """The file that holds a cell's recipe."""
        return self.root / RECIPES / f"{cell.slug}.yaml"

    def _start(self, cell: Cell) -> _Running:
        recipe = self.recipe_of(cell)
        head = f"# python -m mobiq_lightning fit --config {recipe}\n"
        write_text(recipe, head + yaml.safe_dump(cell.recipe, sort_keys=False))
        self.log_of(cell).parent.mkdir(parents=True, exist_ok=True)
        slot = next(i for i in range(self.count) if all(r.slot != i for r in self.running))
        command = [sys.executable, "-m", "mobiq_lightning.comparison.cell", str(recipe), str(cell.folder)]
        log = self.log_of(cell).open("ab")
        process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._environment(slot),
        )
        return _Running(cell, process, log, slot)

    def _environment(self, slot: int) -> dict[str, str]:
        """The environment of a cell: that of this process, with the GPU or the share of the cores that its slot has."""
        environment = dict(os.environ)
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        elif self.count > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.count))
        return environment

    def _quote(self) -> None:
        for one in self.running:
            if time.monotonic() - one.quoted > _NEWS_SECONDS:
                one.quoted = time.monotonic()
                line = next((part for part in reversed(_tail(self.log_of(one.cell))) if ", ETA " in part), "")
                if line:
                    say(f"    {one.cell.name}: {line}")

    def _reason(self, one: _Running) -> str:
        """The error that a cell ended with, in one line."""
        lines = _tail(self.log_of(one.cell))
        code = one.process.returncode
        if code < 0:
            return f"killed by signal {-code}; its log is {self.log_of(one.cell)}"
        errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        text = " ".join(lines[errors[-1] :]).removeprefix("error: ") if errors else (lines or ["no output"])[-1]
        return f"{text[:400]} (exit code {code}; its log is {self.log_of(one.cell)})"


def visible_devices() -> list[str]:
    """Indices of the GPUs that this process may use, found without starting CUDA in it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device for device in given.split(",") if device.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _tail(path: Path) -> list[str]:
    """The last lines of a log."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 8192))
        text = file.read().decode("utf-8", errors="replace").replace("\r", "\n")
        return [line.strip() for line in text.splitlines() if line.strip()]
    return []
