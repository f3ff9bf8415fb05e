"""What something is measured with: versions, machine, memory, time."""

from __future__ import annotations

import ctypes
import gc
import platform
import resource
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mobiq_lightning.version import __version__

_PACKAGES = ("torch", "lightning", "transformers")


def environment() -> dict[str, str]:
    """Versions of packages, device, threads and time that something is measured with, by name."""
    return {
        "mobiq_lightning": __version__,
        **{name: _version(name) for name in _PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(terse=True),
        "device": device_name(),
        "threads": str(torch.get_num_threads()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # serving needs no Lightning
        return "not installed"


def device_name() -> str:
    """Name of the device that models run on here: the GPU, or the processor where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def processor_name() -> str:
    """Model name of the processor of this machine; its architecture where no name is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_gb() -> float:
    """Peak memory of this process in GB (1e9 bytes): on the GPU where there is one, else on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def available_memory() -> int | None:
    """Bytes that a process can still take on the host, within the limit of its control group; None where nobody tells."""
    found: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        if limit.isdecimal():
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8")))
    except (OSError, ValueError, IndexError):
        pass
    return min(found, default=None)


def free_on_device(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, with those that PyTorch keeps there without using them; None for other devices."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def resident_memory() -> int:
    """Bytes that this process takes on the host; 0 where nobody tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return pages * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def give_back_memory() -> None:
    """Gives memory that is in use no more back to the operating system; glibc keeps much of it for what is asked for next."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def format_seconds(seconds: float) -> str:
    """Formats seconds as minutes and seconds, with hours if any: ``75.2 -> "1:15"``, ``4000 -> "1:06:40"``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
