"""Times short calls: many in a row over weights that no cache holds; reported are the median and spread of repeats."""

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
"""The weights that calls rotate over are this many times as large as the last cache, so no call finds its own there."""
MAX_COPIES = 64
_UNKNOWN_CACHE = 32 * 2**20
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Timing:
    """How long one kind of call takes.

    Args:
        us: Microseconds per call, the median of the repeats.
        spread: Distance between the quartiles of the repeats, as a share of the median.
        repeats: Number of times that the row of calls was timed.
    """

    us: float
    spread: float
    repeats: int


class Clock:
    """Times calls on one device.

    On CUDA a row of calls is captured as a graph, which is replayed: what is measured is the device, not the host. On a CPU
    the row is a loop.

    Args:
        device: Device that the calls run on.
        repeats: Number of times that a row is measured.
        seconds: Seconds that one measurement may take on a CPU, roughly.
    """

    def __init__(self, device: torch.device, repeats: int = 15, seconds: float = 0.1) -> None:
        self.device, self.repeats, self.seconds = device, repeats, seconds

    def time(self, calls: Sequence[Call], launches: int = 64) -> Timing:
        """Times calls that do the same work with different weights.

        Args:
            calls: One call or more, made in turn. Nothing in them may wait for the device.
            launches: Least number of calls in one CUDA graph; rounded up so that each is made equally often.
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
    """Sums up at least two samples in microseconds: median, and distance of the quartiles as a share of it."""
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, (upper - lower) / median, len(samples))


def cache_bytes(device: torch.device) -> int:
    """Bytes of a device's last cache: L2 of a GPU, the largest that Linux reports of a CPU, or 32 MiB if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text(encoding="utf-8").strip() for path in _CPU_CACHES.glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=_UNKNOWN_CACHE)


def copies_for(n_bytes: int, cache: int) -> int:
    """Number of weights of `n_bytes` to rotate over so that a cache of `cache` bytes holds none of them; 2 to 64."""
    return max(2, min(MAX_COPIES, CACHES * cache // n_bytes + 1))


def copy_bandwidth(clock: Clock, n_bytes: int) -> float:
    """Measures the bytes per second that copying a tensor moves, bytes read and bytes written added.

    Args:
        clock: Clock of the device.
        n_bytes: Bytes of the tensor; they should be several times those of the last cache.
    """
    sources = [torch.randn(n_bytes // 4, device=clock.device) for _ in range(2)]
    target = torch.empty_like(sources[0])
    copied = clock.time([lambda s=source: target.copy_(s) for source in sources], launches=8)  # type: ignore[misc]
    return 2 * sources[0].nbytes / (copied.us * 1e-6)


def launch_floor(clock: Clock) -> Timing:
    """Times a call that does almost nothing, one addition to a tensor of one number: the least that any call takes."""
    number = torch.zeros(1, device=clock.device)
    return clock.time([lambda: number.add_(1)], launches=256)
