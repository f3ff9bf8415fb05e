"""How fast a loaded model decodes at each budget, measured here; stored with the checkpoint for the policy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobiq_lightning.environment import environment
from mobiq_lightning.files import write_json
from mobiq_lightning.runs import SPEED

WARM_UP_STEPS = 3
"""Steps before a graph is timed: one as usual, one that is captured, one that is replayed."""


def measure_speed(
    model: Any,
    budgets: Sequence[float],
    batch: int = 1,
    prompt_tokens: int = 16,
    new_tokens: int = 32,
    repeats: int = 3,
    graphed: bool | None = None,
) -> list[dict[str, float]]:
    """Greedy decoding at each budget.

    Args:
        model: A loaded elastic model.
        budgets: Bits per weight.
        batch: Rows decoded together.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens that are added.
        repeats: Times that each is measured; the median counts.
        graphed: Whether one captured step is replayed, as servers do that keep it (see `seconds_per_step`), instead of
            calling `generate`, whose host work and whose capture for every call would be all that a GPU shows. By default
            on CUDA.

    Returns:
        For each budget ``{"bits", "used_bits", "tokens_per_second"}``, all rows together; of `generate`, the prompt's time
        included.
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
    """Seconds that a token takes, decoded greedily with a static cache through one `GraphedStep`.

    Args:
        model: A causal language model of transformers, elastic or not.
        ids: (B, T) prompt, which is not timed.
        new_tokens: Steps that are timed together.
        repeats: How often; the cache grows on.

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
    """The same random tokens (B, T) for every model of a vocabulary, on its device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def store_speed(folder: Path, rows: Sequence[dict[str, float]], device: str | None = None, path: str = "") -> None:
    """Writes speed.json into a checkpoint.

    Args:
        folder: The elastic checkpoint.
        rows: Of `measure_speed`.
        device: Name of the device that they were measured on; by default what models run on here.
        path: Of the model, see `ElasticModel.path`.
    """
    measured = environment()
    measured |= {"device": device or measured["device"]} | ({"path": path} if path else {})
    write_json(folder / SPEED, {"environment": measured, "rows": list(rows)})


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
