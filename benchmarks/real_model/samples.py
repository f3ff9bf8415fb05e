"""What the model writes at each precision: a reader sees at once where text breaks down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mobiq_lightning
from mobiq_lightning.sources import load_source

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a fox who learns to swim.",
)
NEW_TOKENS = 60


def samples(model: Path, run: Path, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """Greedy answers to `PROMPTS` at each budget, with the bits that were used, and in full precision.

    Args:
        model: Folder of the source model.
        run: Folder of the finished run.
        budgets: Average bits.
    """
    elastic, source = mobiq_lightning.load(run), load_source(str(model))
    found = []
    for prompt in PROMPTS:
        ids = source.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        texts = {"full": {"text": answer(source, source.model, ids), "used_bits": None}}
        for bits in budgets:
            text = answer(source, elastic, ids, bits=bits)
            texts[f"{bits:g}"] = {"text": text, "used_bits": round(elastic.bits_used().code_bits, 3)}
        found.append({"prompt": prompt, "answers": texts})
    return found


@torch.no_grad()
def answer(source: Any, model: Any, ids: torch.Tensor, **given: Any) -> str:
    """The likeliest continuation of ids (1, T), in words."""
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **given
    )
    return str(source.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)).strip()
