"""``python -m mobiq_lightning``, and the installed command."""

import signal
import sys
from types import FrameType


def run() -> int:
    """Runs the command line; a signal that comes while the package is still being imported is answered in a line too.

    Returns:
        The exit code, see `mobiq_lightning.cli.main`.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        from mobiq_lightning.cli import main

        signal.signal(signal.SIGTERM, before)
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _terminate(number: int, frame: FrameType | None) -> None:
    print("terminated (SIGTERM) before anything was begun", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(run())
