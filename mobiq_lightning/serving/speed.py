"""Measures how fast a loaded model decodes at each budget on this machine, and stores that with the checkpoint."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobiq_lightning.console import say
from mobiq_lightning.environment import environment
from mobiq_lightning.errors import ResultsError
from mobiq_lightning.files import write_json
from mobiq_lightning.runs import SPEED, SpeedNote, merged_speed, read_json

WARM_UP_STEPS = 3
"""Steps before a graph is timed: one without a graph, one that is captured, and one that is replayed."""


def measure_speed(
    model: Any,
    budgets: Sequence[float],
    batch: int = 1,
    prompt_tokens: int = 16,
    new_tokens: int = 32,
    repeats: int = 3,
    graphed: bool | None = None,
) -> list[dict[str, float]]:
    """Measures the speed of greedy decoding of random prompts at each budget.

    Args:
        model: A loaded elastic model.
        budgets: Budgets in bits per weight.
        batch: Rows decoded together.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens that are added.
        repeats: Times that each is measured; the median counts.
        graphed: Whether a captured step is replayed, as servers do that keep it, instead of calling `generate`. By
            default that is so on CUDA, where `generate` would mostly show work of the host and the capture made for
            every call.

    Returns:
        For each budget ``{"bits", "used_bits", "tokens_per_second"}``, the speed being that of all rows together. With
        `generate` the time of the prompt is included.
    """
    if graphed is None:
        graphed = model.device.type == "cuda"
    ids = random_prompt(model, batch, prompt_tokens)
    rows = []
    for bits in budgets:
        if graphed:
            with model.bits(bits):
                seconds = statistics.median(seconds_per_step(model, ids, new_tokens, repeats)) * new_tokens
        else:
            seconds = _seconds_of_generate(model, ids, bits, new_tokens, repeats)
        speed = batch * new_tokens / seconds
        rows.append({"bits": bits, "used_bits": model.bits_used().code_bits, "tokens_per_second": speed})
    return rows


@torch.no_grad()
def seconds_per_step(model: Any, ids: Tensor, new_tokens: int, repeats: int) -> list[float]:
    """Measures the seconds of a decoding step, greedily with a static cache through one `GraphedStep`.

    Args:
        model: A causal language model of transformers, elastic or not.
        ids: (B, T) prompt, which is not timed.
        new_tokens: Steps that are timed together.
        repeats: Number of times that so many steps are timed, each going on where the last one ended.

    Returns:
        For each repeat, the seconds of a step.
    """
    from transformers import StaticCache

    from mobiq_lightning.runtime import GraphedStep, cache_name

    length = ids.shape[1] + WARM_UP_STEPS + new_tokens * repeats
    length = -(-length // 64) * 64  # or attention would pad its mask in every block
    cache = {cache_name(model): StaticCache(config=model.config, max_cache_len=length)}
    step = GraphedStep(model)
    logits = model(input_ids=ids, **cache, use_cache=True).logits
    position = torch.full((1, 1), ids.shape[1], device=ids.device)
    slots = torch.arange(length, device=ids.device)
    seen = torch.zeros((), dtype=model.dtype, device=ids.device)
    unseen = torch.full_like(seen, torch.finfo(model.dtype).min)

    def advance(logits: Tensor) -> Tensor:
        mask = torch.where(slots <= position, seen, unseen).expand(ids.shape[0], 1, 1, -1)
        token = logits[:, -1:].argmax(-1)
        output = step(input_ids=token, position_ids=position, attention_mask=mask, **cache, use_cache=True)
        position.add_(1)
        made: Tensor = output.logits
        return made

    for _ in range(WARM_UP_STEPS):
        logits = advance(logits)
    seconds: list[float] = []
    for _ in range(repeats):
        _wait(model)
        start = time.perf_counter()
        for _ in range(new_tokens):
            logits = advance(logits)
        _wait(model)
        seconds.append((time.perf_counter() - start) / new_tokens)
    return seconds


def random_prompt(model: Any, batch: int, tokens: int) -> Tensor:
    """Random tokens (B, T) on a model's device, equal for all models of the same vocabulary size.

    Args:
        model: A model of transformers.
        batch: Number of rows, B.
        tokens: Tokens of each row, T.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def store_speed(folder: Path, rows: Sequence[dict[str, float]], device: str | None = None, path: str = "") -> None:
    """Puts speeds into speed.json of a checkpoint. Of those that it holds of the same machine and path, budgets beyond the new
    ones stay; between two budgets `BitsPolicy` interpolates.

    Those of another machine or path are replaced, and so is a damaged file; both are said.

    Args:
        folder: The elastic checkpoint.
        rows: Rows that `measure_speed` returned.
        device: Name of the device that they were measured on; by default the one that models run on here.
        path: Path that the model ran on, as its attribute `path` says, such as ``kernels``; empty if it is not known.
    """
    measured = environment()
    measured |= {"device": device or measured["device"]} | ({"path": path} if path else {})
    write_json(folder / SPEED, _with_known(folder / SPEED, {"environment": measured, "rows": list(rows)}))


def _with_known(file: Path, new: dict[str, Any]) -> dict[str, Any]:
    """New content of speed.json with what stays of its former one."""
    if not file.is_file():
        return new
    try:
        known = read_json(file)
        SpeedNote.from_json(known, file)
    except ResultsError as error:
        say(f"{error}. It is written anew.")
        return new
    both = merged_speed(known, new)
    if both is None:
        before, now = (
            f"{there['device']}{', ' + there['path'] if 'path' in there else ''}"
            for there in (known["environment"], new["environment"])
        )
        budgets = ", ".join(f"{row['bits']:g}" for row in new["rows"])
        say(
            f"{file}: speeds of another machine or path ({before}) are replaced by those at {budgets} bits here ({now})."
        )
    return both or new


def _seconds_of_generate(model: Any, ids: Tensor, bits: float, new_tokens: int, repeats: int) -> float:
    # All tokens are made, whatever the model thinks of them.
    settings: dict[str, Any] = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    settings |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    model.generate(ids, bits=bits, **settings)
    seconds = []
    for _ in range(repeats):
        _wait(model)
        start = time.perf_counter()
        model.generate(ids, bits=bits, **settings)
        _wait(model)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
