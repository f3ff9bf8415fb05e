"""How fast a loaded model decodes at each budget, measured here; stored with the checkpoint for the policy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mobiq_lightning.checkpoint.names import SPEED
from mobiq_lightning.checkpoint.provenance import environment
from mobiq_lightning.files import write_json


def measure_speed(
    model: Any,
    budgets: Sequence[float],
    batch: int = 1,
    prompt_tokens: int = 16,
    new_tokens: int = 32,
    repeats: int = 3,
) -> list[dict[str, float]]:
    """Greedy decoding at each budget.

    Args:
        model: A loaded elastic model.
        budgets: Bits per weight.
        batch: Rows decoded together.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens that are added.
        repeats: Times that each is measured; the median counts.

    Returns:
        For each budget ``{"bits", "used_bits", "tokens_per_second"}``, all rows together, the prompt's time included.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt_tokens), generator=generator).to(model.device)
    # All tokens are made, whatever the model thinks of them.
    settings: dict[str, Any] = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    settings |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    rows = []
    for bits in budgets:
        model.generate(ids, bits=bits, **settings)
        seconds = []
        for _ in range(repeats):
            _wait(model)
            start = time.perf_counter()
            model.generate(ids, bits=bits, **settings)
            _wait(model)
            seconds.append(time.perf_counter() - start)
        speed = batch * new_tokens / statistics.median(seconds)
        rows.append({"bits": bits, "used_bits": model.bits_used().code_bits, "tokens_per_second": speed})
    return rows


def store_speed(folder: Path, rows: Sequence[dict[str, float]]) -> None:
    """Writes speed.json into a checkpoint."""
    write_json(folder / SPEED, {"environment": environment(), "rows": list(rows)})


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
