"""Leaves out what libraries say that no user can act on, for as long as a job runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mobiq_lightning.console import verbosity

_WARNINGS = {
    "does not have many workers": "windows of token ids are in memory; a loader has nothing to wait for",
    "Checkpoint directory .* exists and is not empty": "a resumed run writes where it did before",
    "Total length of `list` across ranks is zero": "a fit has no evaluation loaders: a half-calibrated model tells nothing",
    "LeafSpec": "Lightning calls a deprecated function of torch",
    "The dirpath has changed": "a run folder may be moved",
    "smaller than the logging interval": "an epoch over a block is short by design",
    "`instantiate_classes` was deprecated": "Lightning calls a deprecated function of jsonargparse",
    "LightningCLI's args parameter is intended": "jobs are functions, and hand their arguments over",
}
"""Beginnings or parts of warnings that are not shown, as regular expressions, each with the reason why."""
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
"""Loggers of which only warnings are shown: they tell of hardware that is not there, and of every callback."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it, warnings of the table are not shown; afterwards everything is as it was, as a notebook needs it.

    A user who wants to be told of errors alone sees no warning at all; one who wants everything sees all that libraries say.
    """
    if verbosity() == "verbose":
        yield
        return
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message=f".*{message}")
        if verbosity() == "quiet":
            warnings.simplefilter("ignore")
        for logger in levels:
            logger.setLevel(logging.ERROR if verbosity() == "quiet" else logging.WARNING)
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
