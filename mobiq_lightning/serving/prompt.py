"""Continues a prompt with a checkpoint at any budget."""

from __future__ import annotations

import math
from typing import Any

import torch

from mobiq_lightning.checkpoint import load, load_tokenizer
from mobiq_lightning.errors import CheckpointError, RecipeError, shown
from mobiq_lightning.runtime import BitsUsed
from mobiq_lightning.sources import check_ids


def continue_prompt(
    run: str,
    prompt: str,
    bits: float,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    max_bits: int | None = None,
) -> tuple[str, BitsUsed]:
    """Continues a prompt with an elastic checkpoint.

    Args:
        run: Run folder, elastic checkpoint or hub id.
        prompt: Text to continue.
        bits: Average bits per weight to run at.
        max_new_tokens: Tokens to add at most.
        temperature: 0 takes the likeliest token; above, tokens are sampled at this temperature.
        seed: Seed of the sampling.
        max_bits: Load only the planes up to this depth; by default all.

    Returns:
        The prompt with its continuation; the bits used, over all tokens that the model read.

    Raises:
        RecipeError: If an argument makes no sense.
        BitsError: If `bits` is outside of what the checkpoint holds.
        CheckpointError: If there is no checkpoint, or it is damaged.
        DataError: If a token of the prompt has no row in the model's embedding.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise RecipeError(f"prompt {shown(prompt)}; a text that is not empty is expected")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise RecipeError(f"max_new_tokens ({shown(max_new_tokens)}) must be a whole number of at least 1")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
        raise RecipeError(f"temperature ({shown(temperature)}) must be a number of at least 0")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise RecipeError(f"seed ({shown(seed)}) must be a whole number of at least 0")
    model = load(run, max_bits=max_bits, device="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(model.config._name_or_path)
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    rows = model.get_input_embeddings().num_embeddings
    check_ids(encoded["input_ids"].tolist(), tokenizer, rows, "--prompt")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            output = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                bits=bits,
                num_beams=1,  # whatever generation_config.json says
                **sampling,
            )
        except (TypeError, ValueError) as error:  # all else that it is given was checked
            said = (str(error).strip().splitlines() or [""])[0]
            raise CheckpointError(f"{run}: its generation_config.json cannot be used: {said[:200]}") from error
    return str(tokenizer.decode(output[0], skip_special_tokens=True)), model.bits_used()
