# python benchmarks/checkpoint.py [--checkpoint runs/tinystories]
"""Measures the elastic checkpoint: size on disk, load time, memory with fewer planes, turns of the dial.

Without --checkpoint a LLaMA of about 160 M parameters with random weights is sliced without calibration: what is measured
does not depend on the values. Every load runs in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SLICE_BITS = (2, 1, 1, 2, 2)


def make_checkpoint(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mobiq_lightning.checkpoint import CheckpointWriter, ElasticFormat
    from mobiq_lightning.nn import BUDGET_STEP, BlockLayout, CalibratedBlock
    from mobiq_lightning.sources import Source
    from mobiq_lightning.strategies import MLPRouter, ResidualSlices
    from mobiq_lightning.strategies.class_paths import describe_factory

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "source")
    layout = BlockLayout()
    layout.open(model)
    scheme = functools.partial(ResidualSlices, slice_bits=list(SLICE_BITS), group_size=128)
    router = functools.partial(MLPRouter, hidden_features=16)
    learned = [CalibratedBlock(b, layout.group_linears(b, "input"), scheme, router) for b in layout.find(model)]
    for block in learned:
        for routed in block.routed_inputs():
            table = torch.linspace(0.5, -4.5, len(routed.budgets)).expand(len(SLICE_BITS), -1)
            routed.set_tables(table, table)
    source = Source("random", model, None, "", folder / "source")
    stored = ElasticFormat(
        slice_bits=list(SLICE_BITS),
        group_size=128,
        router=describe_factory(router),
        layout=layout.to_stored(model),
        budget_step=BUDGET_STEP,
    )
    CheckpointWriter(source, layout, folder / "elastic").finish(learned, stored, {})
    return folder / "elastic"


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def load_once(checkpoint: str, max_bits: int, check: bool) -> dict[str, float]:
    import mobiq_lightning

    before, start = resident_mb(), time.perf_counter()
    model = mobiq_lightning.load(checkpoint, max_bits=max_bits, check_hashes=check)
    seconds = time.perf_counter() - start
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    planes = sum(b.numel() for n, b in model.named_buffers() if ".plane_" in n)
    grown = resident_mb() - before
    return {
        "max_bits": max_bits, "hashes_checked": check, "seconds": seconds, "tensors_mb": sum(tensors.values()) / 1e6,
        "planes_mb": planes / 1e6, "resident_grown_mb": grown,
    }  # fmt: skip


def turn_dial(checkpoint: str) -> dict[str, float]:
    """100 turns within one generation, with their cost and what they leave in memory."""
    import gc

    import torch

    import mobiq_lightning

    model = mobiq_lightning.load(checkpoint)
    ids = torch.arange(3, 19).unsqueeze(0)
    lowest, highest = model.dial.lowest, model.dial.highest
    seconds: list[float] = []

    def turn(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        model.set_bits(lowest + (ids.shape[1] * 0.37) % (highest - lowest))
        seconds.append(time.perf_counter() - start)
        return scores

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        return len(tensors), sum(t.numel() * t.element_size() for t in tensors)

    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, max_new_tokens=2, logits_processor=[turn], **settings)
    seconds.clear()
    before = alive()
    model.generate(ids, max_new_tokens=100, min_new_tokens=100, logits_processor=[turn], **settings)
    after = alive()
    return {
        "turns": len(seconds), "median_turn_us": sorted(seconds)[len(seconds) // 2] * 1e6,
        "tensors_before": before[0], "tensors_after": after[0], "bytes_before": before[1], "bytes_after": after[1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="run folder or elastic checkpoint; by default one with random weights")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "checkpoint.json")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load_once(arguments.load[0], int(arguments.load[1]), arguments.load[2] == "True")))
        return
    if arguments.turn:
        print(json.dumps(turn_dial(arguments.turn)))
        return
    from mobiq_lightning.checkpoint import export, resolve, summarize_checkpoint
    from mobiq_lightning.environment import environment

    def own_process(*what: str) -> dict[str, float]:
        done = subprocess.run([sys.executable, __file__, *what], check=True, capture_output=True, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = resolve(arguments.checkpoint) if arguments.checkpoint else make_checkpoint(folder)
        summary = summarize_checkpoint(checkpoint)
        start = time.perf_counter()
        export(checkpoint, folder / "four", max_bits=4)
        exported = time.perf_counter() - start
        sizes = {
            name: sum(p.stat().st_size for p in path.glob("*.safetensors")) / 1e6
            for name, path in (("8 bits", checkpoint), ("exported at 4 bits", folder / "four"))
        }
        results = {
            "checkpoint": arguments.checkpoint or "random weights, 12 blocks of 768 x 3072, bfloat16, groups of 128",
            "environment": environment(),
            "sliced_weights": summary.n_weights,
            "bits_per_weight": summary.bits_per_weight("planes", "scales and biases"),
            "bits_per_weight_with_routers": summary.bits_per_weight(
                "planes", "scales and biases", "routers", "threshold tables"
            ),
            "files_mb": sizes,
            "export_seconds": exported,
            "loads": [
                own_process("--load", str(checkpoint), bits, check)
                for bits, check in (("8", "True"), ("8", "False"), ("4", "True"), ("4", "False"))
            ],
            "dial": own_process("--turn", str(checkpoint)),
        }
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
