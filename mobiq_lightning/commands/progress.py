"""Progress bars of transformers, which would stand between the lines that a command prints."""

from __future__ import annotations


def no_progress_bars() -> None:
    """Switches off the bars that transformers shows while it loads a model."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
