"""``generate``: continues a prompt with a finished run, at any bits."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from mobiq_lightning.errors import RecipeError


def generate(
    run: str,
    prompt: str = "",
    bits: float = 4.0,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Continues a prompt with the elastic checkpoint of a run, and prints the text and the bits that were used.

    Args:
        run: Run folder, or the elastic checkpoint itself.
        prompt: Text to continue; must not be empty.
        bits: Average bits per weight to run at.
        max_new_tokens: Tokens to add at most.
        temperature: 0 takes the likeliest token; above, tokens are sampled at this temperature.
        seed: Of the sampling.
    """
    text, used = continue_prompt(run, prompt, bits, max_new_tokens, temperature, seed)
    print(text)
    print(f"[{used:.3f} code bits per weight used, {bits:g} asked for]", file=sys.stderr)


def continue_prompt(
    run: str, prompt: str, bits: float, max_new_tokens: int, temperature: float, seed: int
) -> tuple[str, float]:
    """See `generate`.

    Returns:
        The prompt with its continuation; code bits used per weight, over all tokens that the model read.
    """
    if not prompt.strip():
        raise RecipeError(
            'generate: --prompt is missing or empty; give the text to continue, as in --prompt "Once upon"'
        )
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from mobiq_lightning.hf import load
    from mobiq_lightning.layers import routed_inputs
    from mobiq_lightning.metrics import UsedBits
    from mobiq_lightning.routed_input import record_gates

    disable_progress_bar()
    model = load(run, device="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    inputs = routed_inputs(model)
    for routed in inputs:
        routed.set_bits(bits, model.config.quantization_config.threshold_scope)
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    used = UsedBits([routed.n_weights for routed in inputs])
    with torch.random.fork_rng(), record_gates(inputs) as records:
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    used.update([torch.cat([bits.flatten() for bits in record]).cpu() for record in records])
    return str(tokenizer.decode(output[0], skip_special_tokens=True)), float(used.compute())


class _Parser(ArgumentParser):
    """Says what is wrong in one line instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise RecipeError(f"generate: {message}")


def parse(arguments: list[str]) -> None:
    """Runs `generate` on a command line."""
    auto_cli(generate, args=arguments, as_positional=True, parser_class=_Parser)
