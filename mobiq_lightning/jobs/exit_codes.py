"""How a job ends: its errors as lines on the terminal, and the exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mobiq_lightning.errors import MissingExtraError, MobiqError, RecipeError


def exit_code(job: Callable[[], object]) -> int:
    """Runs a job, and says in a line what went wrong.

    Args:
        job: What to run.

    Returns:
        0 done, 1 failed, 2 asked for something that does not exist or is not installed, 130 interrupted,
        141 nobody reads the output any more.
    """
    try:
        job()
    except MobiqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (RecipeError, MissingExtraError)) else 1
    except BrokenPipeError:  # whoever read the output, as `head` does, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain once more at its end
        return 141
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last finished epoch", file=sys.stderr)
        return 130
    return 0
