# python -m benchmarks.scaling.block_time
"""Time of a training step on one block of LLaMA-2-7B shapes, on whatever device is there, and minutes for the whole model.

The block has random weights, and goes through the steps of the stages of `recipes/llama2-7b.yaml`. On a CPU windows are cut, and
the time is scaled. Two small tables say how a step of the first stage grows with tokens and with parameters.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.scaling.memory import VOCABULARY
from mobiq_lightning.calibration import ElasticCalibration
from mobiq_lightning.calibration.planning import Bench, StepTimes, sizes_of
from mobiq_lightning.calibration.planning.work import stage_phases
from mobiq_lightning.calibration.schedule import Stage
from mobiq_lightning.environment import device_name, format_seconds
from mobiq_lightning.nn import full_precision
from mobiq_lightning.sources import TextWindows
from mobiq_lightning.strategies import BlockReconstruction, MLPRouter, ProgressiveSlices, SampledBudget

BLOCKS = 32
"""Decoder blocks of LLaMA-2-7B."""
WINDOWS, WINDOW = 128, 2048
"""Calibration windows of the recipe, and their tokens."""


class Block:
    """One block of a random LLaMA, with the stages of the recipe.

    Args:
        stages: The stages.
        width: Width of the model.
        mlp: Width of its MLP.
        windows: Windows and tokens of the calibration.
        device: Where to measure.
    """

    def __init__(
        self, stages: list[Stage], width: int, mlp: int, windows: tuple[int, int], device: torch.device
    ) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        self.config: Any = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=BLOCKS,
            num_attention_heads=width // 128,
            num_key_value_heads=width // 128,
            dtype=torch.bfloat16,
        )
        self.text = TextWindows(n_samples=windows[0], seq_len=windows[1], batch_size=1)
        self.module = ElasticCalibration(
            "random",
            partial(ProgressiveSlices, slice_bits=(2, 1, 1, 2, 2), group_size=128),
            partial(MLPRouter, hidden_features=16),
            SampledBudget(2.0, 6.0),
            BlockReconstruction(),
            stages=stages,
            eval_bits=[2],
        )
        with torch.device("meta"):
            self.sizes = sizes_of(AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16), self.module)
        self.bench = Bench(self.config, 1, self.sizes, self.module, self.text, device)
        self.device = device

    def ids(self, tokens: int) -> Tensor:
        """One window of random tokens."""
        return torch.randint(VOCABULARY, (1, tokens), device=self.device)

    def bare(self, tokens: int) -> float:
        """Seconds of the block's own forward and backward pass, with gradients of its weights."""
        sliced, inputs = self.bench.sliced, self.bench.sliced.all_inputs()
        weights = list(sliced.decoder[0].parameters())
        hidden = sliced.caller.embed(self.ids(tokens))
        sliced.caller.bring(0)

        def step() -> None:
            with full_precision(inputs):
                sliced.caller.call(0, hidden).float().square().mean().backward()
            for weight in weights:
                weight.grad = None

        for weight in weights:
            weight.requires_grad_(True)
        seconds = self.bench.seconds(step)
        for weight in weights:
            weight.requires_grad_(False)
        return seconds

    def read(self, tokens: int) -> float:
        """Seconds in which a window goes through the block in full precision."""
        sliced = self.bench.sliced
        hidden = sliced.caller.embed(self.ids(tokens))
        with torch.no_grad(), full_precision(sliced.all_inputs()):
            return self.bench.seconds(lambda: sliced.caller.call(0, hidden))


def stages_of(path: Path) -> list[Stage]:
    """The stages of a recipe."""
    return [Stage(**stage) for stage in yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["stages"]]


def whole_model(stages: list[Stage], tokens: int, device: torch.device, width: int, mlp: int) -> None:
    """Prints a line for each kind of step of a block, and what the whole model takes.

    Fewer tokens than a window has are measured twice, whole and half of them, and the time goes on along that line: what is done
    to weights does not grow with tokens.
    """
    block = Block(stages, width, mlp, (WINDOWS, WINDOW), device)
    lengths = (tokens,) if tokens >= WINDOW else (tokens // 2, tokens)
    print(
        f"One block of width {width} and {mlp}, {block.sizes.sliced_of_block / 1e6:.0f} M weights, {tokens} tokens a step"
    )

    def of_window(measured: list[float]) -> float:
        if len(measured) == 1:
            return measured[0]
        half, whole = measured
        return whole + (WINDOW - tokens) * max(0.0, whole - half) / (tokens - tokens // 2)

    bare = [block.bare(length) for length in lengths]
    print(f"{'its own forward and backward pass':44}{1e3 * bare[-1]:10.1f} ms")
    known: dict[str, list[float]] = {}
    times = StepTimes(read=of_window([block.read(length) for length in lengths]))
    for number, stage in enumerate(stages):
        key = f"{' + '.join(stage.train)} {stage.depth or ''} {stage.other_depths or ''}"
        if key not in known:
            known[key] = [block.bench.stage_seconds(stage, block.ids(length)) for length in lengths]
        step = known[key][-1]
        print(f"{f'stage {number + 1}: {key}':44}{1e3 * step:10.1f} ms, {step / bare[-1]:5.2f} times that", flush=True)
        times.stages[number] = of_window(known[key])
    phases = stage_phases(block.sizes, block.module, WINDOWS, times)
    seconds = sum(phase.steps * phase.seconds for phase in phases)
    scaled = "" if len(lengths) == 1 else f", from {lengths[0]} and {lengths[1]} tokens"
    print(f"{WINDOWS} windows of {WINDOW} tokens, {BLOCKS} blocks{scaled}: {format_seconds(seconds)}")


def growth(stages: list[Stage], device: torch.device) -> None:
    """Prints what a step of the first stage takes against tokens, and against parameters."""
    for shapes, lengths in (
        (((1024, 2816),), (128, 256, 512, 1024)),
        (((512, 1408), (1024, 2816), (2048, 5632)), (512,)),
    ):
        for width, mlp in shapes:
            block = Block(stages[:1], width, mlp, (1, 1024), device)
            weights = block.sizes.sliced_of_block / 1e6
            for tokens in lengths:
                seconds = block.bench.stage_seconds(stages[0], block.ids(tokens))
                per = 1e6 * seconds / weights / tokens
                print(
                    f"{weights:6.1f} M weights, {tokens:5} tokens: {1e3 * seconds:8.1f} ms, {per:6.2f} us per M weights and token"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/llama2-7b.yaml"), help="whose stages are taken")
    parser.add_argument("--tokens", type=int, help="tokens of a step; by default 2048 on a GPU and 256 on a CPU")
    parser.add_argument("--width", type=int, default=4096, help="width of the block")
    parser.add_argument("--mlp", type=int, default=11008, help="width of its MLP")
    parser.add_argument("--no-growth", action="store_true", help="leave out the tables against tokens and parameters")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    print(f"{device_name()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    stages = stages_of(arguments.recipe)
    if not arguments.no_growth:
        growth(stages, device)
    tokens = arguments.tokens or (2048 if device.type == "cuda" else 256)
    whole_model(stages, tokens, device, arguments.width, arguments.mlp)


if __name__ == "__main__":
    main()
