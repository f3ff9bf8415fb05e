"""Timing of short calls: many in a row over weights that no cache holds, the median of repeats, the spread beside it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

CACHES = 3
"""Weights are rotated over so many times the size of the last cache, so that no call finds its own there."""
MAX_COPIES = 64
_UNKNOWN_CACHE = 32 * 2**20
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Timing:
    """Of one kind of call.

    Args:
        us: Microseconds per call, the median of the repeats.
        spread: Distance between the quartiles of the repeats, as a share of the median.
        repeats: How often the row of calls was timed.
    """

    us: float
    spread: float
    repeats: int


class Clock:
    """Times calls on one device.

    On CUDA a row of calls is captured as a graph, which is replayed: what is measured is the device, not the host. On a CPU
    the row is a loop.

    Args:
        device: Where the calls run.
        repeats: Times that a row is measured.
        seconds: About how long one measurement may take on a CPU.
    """

    def __init__(self, device: torch.device, repeats: int = 15, seconds: float = 0.1) -> None:
        self.device, self.repeats, self.seconds = device, repeats, seconds

    def time(self, calls: Sequence[Call], launches: int = 64) -> Timing:
        """Times calls that do the same with other weights.

        Args:
            calls: At least one; they are made in turn. Nothing in them may wait for the device.
            launches: Calls in one CUDA graph, at least; rounded up so that each is made equally often.
        """
        with torch.no_grad():
            if self.device.type == "cuda":
                return self._on_cuda(calls, launches)
            return self._on_cpu(calls)

    def _on_cuda(self, calls: Sequence[Call], launches: int) -> Timing:
        total = -(-launches // len(calls)) * len(calls)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # compiles and allocates, which a captured region must not
            for call in calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in itertools.islice(itertools.cycle(calls), total):
                call()
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize(self.device)
        samples: list[float] = []
        for _ in range(self.repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize(self.device)
            samples.append(start.elapsed_time(end) * 1e3 / total)
        graph.reset()
        return summary(samples)

    def _on_cpu(self, calls: Sequence[Call]) -> Timing:
        for call in calls:
            call()
        start = time.perf_counter()
        calls[0]()
        one = max(time.perf_counter() - start, 1e-7)
        # Whole turns, so that what a call finds in the cache does not depend on where a sample begins.
        turns = max(1, round(self.seconds / self.repeats / one / len(calls)))
        repeats = max(3, min(self.repeats, round(self.seconds / (one * len(calls)))))
        samples: list[float] = []
        latest = time.perf_counter() + 3 * self.seconds  # where the estimate was far off, fewer repeats must do
        while len(samples) < repeats and (len(samples) < 3 or time.perf_counter() < latest):
            start = time.perf_counter()
            for _ in range(turns):
                for call in calls:
                    call()
            samples.append((time.perf_counter() - start) * 1e6 / (turns * len(calls)))
        return summary(samples)


def summary(samples: Sequence[float]) -> Timing:
    """Median and relative distance of the quartiles of at least two samples, in microseconds."""
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, (upper - lower) / median, len(samples))


def cache_bytes(device: torch.device) -> int:
    """Size of the device's last cache: L2 of a GPU, the largest one that Linux reports of a CPU, 32 MiB if it does not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text(encoding="utf-8").strip() for path in _CPU_CACHES.glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=_UNKNOWN_CACHE)


def copies_for(n_bytes: int, cache: int) -> int:
    """Weights to rotate over, of `n_bytes` each, so that none is found in a cache of `cache` bytes; 2 to 64."""
    return max(2, min(MAX_COPIES, CACHES * cache // n_bytes + 1))


def copy_bandwidth(clock: Clock, n_bytes: int) -> float:
    """Bytes per second that copying a tensor moves, read and written.

    Args:
        clock: Of the device.
        n_bytes: Of the tensor; several times the last cache.
    """
    sources = [torch.randn(n_bytes // 4, device=clock.device) for _ in range(2)]
    target = torch.empty_like(sources[0])
    copied = clock.time([lambda s=source: target.copy_(s) for source in sources], launches=8)  # type: ignore[misc]
    return 2 * sources[0].nbytes / (copied.us * 1e-6)


def launch_floor(clock: Clock) -> Timing:
    """What a call costs that does nothing to speak of: one addition to a tensor of one number."""
    number = torch.zeros(1, device=clock.device)
    return clock.time([lambda: number.add_(1)], launches=256)
