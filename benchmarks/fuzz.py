# python -m benchmarks.fuzz
"""Gives every reader of files thousands of damaged ones, and prints how each ended.

A reader may refuse a file with an error of the package, or accept it. Any other exception, more than 5 seconds (60 where charts
are drawn) or more than 1 GB of further memory is a fault; then the exit code is 1, and the first input of each fault is kept.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from tests.conftest import make_tokenizer
from tests.fuzz_checkpoints import checkpoint_readers
from tests.fuzz_readers import Reader, readers
from tests.fuzzing import ACCEPTED, CLEAN, outcome

GIGABYTES = 1.0
SLOW, LARGE = "slow", "> 1 GB"


class _TooSlowError(BaseException):
    """Raised in the reader after twice the time that it may take."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Ends what takes twice as long as it may."""

    def stop(*_: object) -> None:
        raise _TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak() -> float:
    """Most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ending(reader: Reader, folder: Path) -> str:
    """How one reading ends: as `outcome` says it, or beyond a limit."""
    memory, started = peak(), time.monotonic()
    try:
        with limited(reader.seconds):
            end = outcome(lambda: reader.read(folder))
    except _TooSlowError:
        return SLOW
    if time.monotonic() - started > reader.seconds:
        return SLOW
    return LARGE if peak() - memory > GIGABYTES else end


def fuzz(reader: Reader, count: int, seed: int, keep: Path) -> Counter[str]:
    """Counts how a reader ends on mutants of its file.

    Args:
        reader: The reader.
        count: Mutants.
        seed: Decides which.
        keep: Folder for the first input of each fault.
    """
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(reader.folder, Path(scratch) / "files"))
        for content in reader.inputs(Random(f"{seed}/{reader.name}"), count):
            path = folder / reader.file
            path.write_bytes(content)
            end = ending(reader, folder)
            ends[end] += 1
            if end not in (CLEAN, ACCEPTED) and ends[end] == 1:
                keep.mkdir(parents=True, exist_ok=True)
                kept = keep / f"{reader.name.replace(', ', '-').replace(' ', '-')}-{len(ends)}-{reader.file}"
                kept.write_bytes(content)
                print(f"{reader.name}: {end}: {kept}", file=sys.stderr)
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="inputs of each reader; slow ones get a part (2000)")
    parser.add_argument("--seed", type=int, default=0, help="decides the inputs (0)")
    parser.add_argument("--only", default="", help="readers whose names hold this text")
    parser.add_argument("--keep", type=Path, default=Path("fuzz"), help="folder for inputs that are faults (fuzz)")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    faults, total = 0, 0
    print(f"{'reader':34} {'inputs':>7} {'clean':>7} {'accepted':>9} {'other':>6} {SLOW:>6} {LARGE:>7} {'seconds':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch)
        for reader in [*readers(written / "files"), *checkpoint_readers(written / "checkpoints", make_tokenizer)]:
            if given.only not in reader.name:
                continue
            started = time.monotonic()
            ends = fuzz(reader, max(1, given.count // reader.cost), given.seed, given.keep)
            known = {name: ends[name] for name in (CLEAN, ACCEPTED, SLOW, LARGE)}
            other = ends.total() - sum(known.values())
            faults += other + known[SLOW] + known[LARGE]
            total += ends.total()
            print(
                f"{reader.name:34} {ends.total():7} {known[CLEAN]:7} {known[ACCEPTED]:9} {other:6} {known[SLOW]:6} "
                f"{known[LARGE]:7} {time.monotonic() - started:8.1f}",
                flush=True,
            )
    print(f"{total} inputs, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
