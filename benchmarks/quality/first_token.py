# python -m benchmarks.quality.first_token runs/tinystories-656k --bits 2.25,2.5,3.5
"""Does it help to read the first token of every window, the attention sink, at full depth by construction?

Measures the router of a finished run as it is, and with every gate of the first token open, on the run's evaluation text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from mobiq_lightning.checkpoint import load
from mobiq_lightning.evaluation.metrics import Perplexity, log_probabilities
from mobiq_lightning.nn import routed_inputs
from mobiq_lightning.sources import IGNORED, TextWindows, load_source


@contextmanager
def first_token_open(model: Any) -> Iterator[None]:
    """Within it, the first token of every window reads all that is stored."""
    routers = [routed.router for routed in routed_inputs(model)]
    for router in routers:
        scores = router.scores

        def opened(x: torch.Tensor, scores: Any = scores) -> torch.Tensor:
            found: torch.Tensor = scores(x).clone()
            found[:, 0] = torch.inf
            return found

        router.scores = opened  # type: ignore[method-assign]
    try:
        yield
    finally:
        for router in routers:
            del router.scores  # the class's own again


@torch.no_grad()
def measure(model: Any, data: TextWindows, bits: float, scope: Any) -> str:
    perplexity = Perplexity()
    model.set_bits(bits, scope)
    for batch in data.val_dataloader()[0]:
        labels = batch["labels"]
        scored = labels[:, 1:] != IGNORED
        logits = model(input_ids=batch["input_ids"], attention_mask=(labels != IGNORED).long(), use_cache=False).logits
        perplexity.update(log_probabilities(logits[:, :-1][scored]), labels[:, 1:][scored])
    return f"perplexity {float(perplexity.compute()):.3f} at {model.bits_used().code_bits:.3f} bits"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.first_token", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--bits", default="2.25,2.5,3.5", help="budgets")
    given = parser.parse_args()
    config = yaml.safe_load((given.run / "config.yaml").read_text(encoding="utf-8"))
    source, data = load_source(config["model"]["pretrained"]), TextWindows(**config["data"])
    data.read(source.tokenizer, source.tokenizer_hash, "validate")
    model, scope = load(given.run), config["model"]["threshold_scope"]
    for bits in map(float, given.bits.split(",")):
        print(f"{bits:g} bits, router: {measure(model, data, bits, scope)}", flush=True)
        with first_token_open(model):
            print(f"{bits:g} bits, first token at full depth: {measure(model, data, bits, scope)}", flush=True)


if __name__ == "__main__":
    main()
