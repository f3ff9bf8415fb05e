"""``latency RUN --warm-up``: compiles what a checkpoint needs before it is served."""

from __future__ import annotations

import torch

from mobiq_lightning.errors import RecipeError
from mobiq_lightning.runtime import warm_up


def warm_up_checkpoint(run: str) -> None:
    """Compiles all kernels that a checkpoint needs on this GPU, and says how long each took.

    Args:
        run: Run folder, elastic checkpoint or hub id.

    Raises:
        RecipeError: Without a GPU that its kernels run on.
        CheckpointError: If there is no checkpoint.
    """
    from mobiq_lightning.checkpoint import load
    from mobiq_lightning.console import say

    model = load(run, device="cuda" if torch.cuda.is_available() else "cpu")
    if model.path != "kernels":
        raise RecipeError(f"latency: --warm-up compiles kernels, but here the model runs on the {model.path}")
    say(f"Compiling what {run} needs on {torch.cuda.get_device_name(model.device)}")
    for tokens, seconds in warm_up(model).items():
        print(f"{tokens:5d} tokens: {seconds:6.1f} s", flush=True)
