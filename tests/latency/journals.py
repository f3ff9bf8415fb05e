"""What the tests of latencies share: a small shape, and a journal that measures for milliseconds."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from mobiq_lightning.latency import Clock
from mobiq_lightning.latency.journal import Journal
from mobiq_lightning.latency.shapes import Shape

CPU = torch.device("cpu")
TINY = Shape("tiny", "gate_up", (48, 80), 200, group_size=64)


def quick(folder: Path, path: str, device: torch.device = CPU) -> Journal:
    head = {"what": path, "environment": {"device": "here"}}
    clock = Clock(device, repeats=3, seconds=0.003)
    return Journal(folder, path, head, clock, time.monotonic() + 600, copy_bytes_per_s=1e10)
