"""Compiles everything that a model can need before the first request, so that no request waits for a compiler."""

from __future__ import annotations

import time
from typing import Any

import torch

from mobiq_lightning.nn import fixed_depth

FEW_TOKENS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of tokens for which the decode kernel and the preparation are compiled differently."""
_ROW_TOKENS = 64


@torch.no_grad()
def warm_up(model: Any) -> dict[int, float]:
    """Runs a loaded elastic model once at every number of tokens that takes a kernel of its own.

    What is compiled stays in Triton's cache on disk (``TRITON_CACHE_DIR``) and serves later processes too. Where the
    reference runs, weights are unpacked at every depth instead, as many as the model keeps. Counts of bits are set to
    0.

    Args:
        model: Elastic model on the device that it will run on.

    Returns:
        Seconds that the runs took, by number of tokens.
    """
    seconds: dict[int, float] = {}
    for tokens in token_counts(model):
        rows = 1 if tokens <= _ROW_TOKENS else -(-tokens // _ROW_TOKENS)
        ids = torch.zeros(rows, tokens if rows == 1 else _ROW_TOKENS, dtype=torch.long, device=model.device)
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        if model.path != "kernels":
            for depth in model.dial.inputs[0].depths:
                with fixed_depth(model.dial.inputs, depth):
                    model(input_ids=ids, use_cache=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds[tokens] = time.perf_counter() - start
    model.dial.reset()
    return seconds


def token_counts(model: Any) -> tuple[int, ...]:
    """Gives the numbers of tokens at which `warm_up` runs an elastic model: those that take a kernel of their own."""
    if model.path != "kernels":
        return (1,)
    from mobiq_lightning.kernels.dispatch import path_for
    from mobiq_lightning.kernels.tuning import table_for

    weights = model.dial.inputs[0].kernel.weights
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "interpreter"
    until = table_for(name).grouped_until
    more = [_ROW_TOKENS + 1] if path_for(_ROW_TOKENS + 1, weights, model.dtype) == "grouped" else []
    if path_for(max(until, _ROW_TOKENS) + 1, weights, model.dtype) == "dequantize":
        more.append(max(until, _ROW_TOKENS) + 1)
    return (*FEW_TOKENS, *more)
