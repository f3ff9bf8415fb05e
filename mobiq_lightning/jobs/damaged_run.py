"""A finished run whose checkpoint is damaged: it is built again from the training checkpoints."""

from __future__ import annotations

from mobiq_lightning.calibration import can_be_read
from mobiq_lightning.checkpoint import add_results, check_files, content_hash
from mobiq_lightning.console import say
from mobiq_lightning.errors import CheckpointError
from mobiq_lightning.runs import CHECKPOINTS, RESULTS, SPEED, RunFolder, read_results

_SHOWN = 5
"""Damaged files that are named."""


def must_be_rebuilt(folder: RunFolder) -> bool:
    """Looks whether a finished run's checkpoint holds the bytes that were written, and says what does not.

    Returns:
        Whether it must be built again; training checkpoints are there from which it can be.

    Raises:
        CheckpointError: If it is damaged, and nothing is left to build it from.
    """
    problems = check_files(folder.checkpoint)
    if not problems:
        return False
    shown = "; ".join(problems[:_SHOWN]) + (f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else "")
    whole, _ = folder.training.newest(can_be_read)
    if whole is None:
        raise CheckpointError(
            f"{folder.checkpoint} is damaged: {shown}. {folder.path / CHECKPOINTS} holds no whole training checkpoint to build "
            "it again from: put back a copy, or --overwrite to calibrate again"
        )
    say(f"{folder.checkpoint} is damaged: {shown}. It is built again from {whole.name}; {RESULTS} is kept.")
    return True


def carry_over(folder: RunFolder, speed: bytes | None) -> None:
    """Puts what was measured into a checkpoint that was built again.

    Args:
        folder: The run.
        speed: Content of the former checkpoint's speed.json, if it had one.
    """
    if speed is not None:
        (folder.checkpoint / SPEED).write_bytes(speed)
    add_results(folder.checkpoint, read_results(folder.path / RESULTS))


def results_fit(folder: RunFolder) -> bool:
    """Whether the results of a run are of the checkpoint that it holds now, as far as they say."""
    measured = read_results(folder.path / RESULTS).measured
    known, held = measured and measured.checkpoint, content_hash(folder.checkpoint)
    if None in (known, held) or known == held:
        return True
    say(f"{folder.checkpoint} holds other bytes than those that {RESULTS} is of; it is compared again.")
    return False
