"""The process of one peer: measures its cells one after the other, in the Python that the peer is installed in."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mobiq_lightning.environment import processor_name

from .peer import Peer, Task, most_levels
from .protocol import Protocol, measure_quality
from .registry import PEERS
from .rows import DONE, FAILED, MISSING, Cell, Journal

_SHARED = ("torch", "transformers", "mobiq-lightning")


def versions(peer: Peer) -> dict[str, str]:
    """Of the peer's package and of what everything runs on.

    Raises:
        PackageNotFoundError: If the peer's is not installed.
    """
    names = _SHARED if peer.package is None else (peer.package, *_SHARED)
    return {name: version(name) for name in names}


def measure(peer: Peer, cell: Cell, protocol: Protocol) -> dict[str, Any]:
    """What a row says of a quantized model."""
    seed = cell.seed or 0
    random.seed(seed)
    torch.manual_seed(seed)
    source = protocol.load()
    data = protocol.read(source, seed)
    reset_peak()
    with tempfile.TemporaryDirectory() as scratch:
        ids = data.calibration_ids()
        task = Task(source, ids, cell.bits, cell.group_size, seed, protocol, Path(scratch))
        start = time.perf_counter()
        model = peer.run(task)
        seconds = time.perf_counter() - start
    peak = peak_mb()
    if peer.on_grid:
        check_grid(task, model)
    start = time.perf_counter()
    perplexity, kl = measure_quality(model.eval(), data, protocol.load().model)
    return {
        "perplexity": perplexity,
        "kl": kl,
        "seconds": round(seconds, 2),
        "eval_seconds": round(time.perf_counter() - start, 2),
        "peak_mb": round(peak, 1),
        "calibration_hash": data.calibration_digest if peer.calibrated else None,
        "data_hash": data.protocol.data_hash,
    }


def check_grid(task: Task, model: Any) -> None:
    """A wrapper that hands back more than the bits it was asked for would win every table.

    Raises:
        ValueError: If a group holds more values than there are codes, or a linear was left out.
    """
    found = dict(task.linears(model))
    full = dict(task.linears(task.protocol.load().model))
    for name, linear in found.items():
        levels = most_levels(linear.weight, task.group_size)
        if levels > 2**task.bits:
            raise ValueError(f"{name}: a group holds {levels} values, {task.bits} bits give {2**task.bits}")
    if missing := full.keys() - found.keys():
        raise ValueError(f"{sorted(missing)[0]} is no linear any more")


def row_of(peer: Peer, cell: Cell, protocol: Protocol) -> dict[str, Any]:
    """The row of a cell, whatever happens to the peer."""
    row: dict[str, Any] = {**asdict(cell), "setting": peer.setting, "ours": peer.ours}
    try:
        row["versions"] = versions(peer)
        row |= {"status": DONE, **measure(peer, cell, protocol)}
    except PackageNotFoundError:
        row |= {"status": MISSING, "error": f"pip install {peer.package}"}
    except Exception as error:  # noqa: BLE001 - packages raise what they like, and the table names it
        row |= {"status": FAILED, "error": describe(error)}
    return row | machine()


def describe(error: BaseException) -> str:
    """Type and first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0]}"[:400]


def machine() -> dict[str, Any]:
    return {
        "device": processor_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def reset_peak() -> None:
    """Lets the peak start anew, where the kernel can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_mb() -> float:
    """Largest resident memory of this process, all that was imported included."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    job = json.loads(sys.stdin.read())
    journal, protocol = Journal(Path(job["folder"])), Protocol(**job["protocol"])
    for given in job["cells"]:
        cell = Cell(**given)
        row = row_of(PEERS[cell.peer], cell, protocol)
        journal.add(row)
        print(f"== {row['peer']} {row['bits']} {row['group_size']} {row['status']}", flush=True)
        if row["status"] == MISSING:
            return


if __name__ == "__main__":
    main()
