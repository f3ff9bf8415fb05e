"""A device runs out of memory in the middle of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mobiq_lightning.errors import ModelError


@contextmanager
def out_of_memory(how_it_goes_on: Callable[[], str]) -> Iterator[None]:
    """Within it, an allocation that a device has no room for is a `ModelError` of a line.

    Args:
        how_it_goes_on: Says what of the work is kept and how to go on.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = ". ".join(" ".join(str(error).split()).split(". ")[:3]).rstrip(".")
        raise ModelError(
            f"{said}. More is needed than was predicted, or others use the device: `check` says what each phase takes; lower "
            f"data.batch_size or data.eval_batch_size, or use a larger device; {how_it_goes_on()}"
        ) from error
