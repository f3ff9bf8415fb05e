# python examples/serve_under_load.py runs/tiny
"""Serves a waiting queue with one elastic model whose bits follow the load.

Requests arrive at random, few at first, many at the peak, few again. Before every batch the policy turns the dial by the
length of the queue; the batch is generated for real. Printed are queue, bits, and what was used.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from transformers import AutoTokenizer

import mobiq_lightning
from mobiq_lightning import BitsPolicy
from mobiq_lightning.checkpoint import resolve
from mobiq_lightning.serving import measure_speed, store_speed

ARRIVALS = [1, 1, 2, 5, 8, 6, 4, 3, 2, 1, 1, 0, 0, 0, 0, 0, 0]
"""Requests that arrive per step on average."""


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="run folder or elastic checkpoint")
    parser.add_argument("--batch", type=int, default=4, help="requests served together")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens generated per request")
    parser.add_argument("--measure-speed", action="store_true", help="measure bits -> tokens/s first, and store it")
    arguments = parser.parse_args()

    model = mobiq_lightning.load(arguments.checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(resolve(arguments.checkpoint), padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if arguments.measure_speed:
        rows = measure_speed(model, [2, 3, 4, 6, 8])
        store_speed(resolve(arguments.checkpoint), rows)
        print("\n".join(f"{row['bits']:g} bits: {row['tokens_per_second']:.0f} tokens/s" for row in rows))

    policy = BitsPolicy.from_checkpoint(arguments.checkpoint, off_peak_queue=2, peak_queue=16)
    levels = [f"{level.bits:g} bits (perplexity {level.perplexity:.2f})" for level in policy.levels]
    print("levels:", ", ".join(levels))
    if policy.no_faster:
        print("left out, since they are no faster here:", ", ".join(f"{bits:g} bits" for bits in policy.no_faster))
    print("queue lengths at which the next level begins:", [round(point, 1) for point in policy.switching_points])

    draw = random.Random(0)
    queue: list[str] = []
    prompts = ["Once upon a time", "Return a", "The", "If the"]
    for step, mean in enumerate(ARRIVALS):
        queue += [draw.choice(prompts) for _ in range(draw.randint(0, 2 * mean))]
        if not queue:
            continue
        model.set_bits(policy.bits_for_queue(len(queue)))
        batch, waiting = queue[: arguments.batch], len(queue)
        queue = queue[arguments.batch :]
        inputs = tokenizer(batch, return_tensors="pt", padding=True).to(model.device)
        start = time.perf_counter()
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=arguments.new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        seconds, used = time.perf_counter() - start, model.bits_used()
        print(
            f"step {step:2d}: {waiting:2d} waiting, {policy.bits:g} bits asked for, {used.code_bits:.2f} used, "
            f"{len(batch)} served in {seconds:.2f} s"
        )


if __name__ == "__main__":
    main()
