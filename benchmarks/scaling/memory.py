# python -m benchmarks.scaling.memory --to benchmarks/results/memory.json --models 16M,64M,256M,1.1B
"""Memory and time of a calibration against the size of the model, beside what `check` predicts.

Random LLaMAs in bfloat16 are made in a scratch folder, and removed; each goes through a whole `fit` of a short recipe.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

SHAPES = {
    "16M": {"width": 256, "mlp": 704, "blocks": 11, "heads": 4, "key_heads": 1, "tied": True},
    "64M": {"width": 512, "mlp": 1408, "blocks": 17, "heads": 8, "key_heads": 2, "tied": True},
    "256M": {"width": 1024, "mlp": 2816, "blocks": 20, "heads": 16, "key_heads": 4, "tied": True},
    "1.1B": {"width": 2048, "mlp": 5632, "blocks": 22, "heads": 32, "key_heads": 4, "tied": False},
}
"""Random models, by name."""
LARGE = {
    "7B": {"width": 4096, "mlp": 11008, "blocks": 32, "heads": 32, "key_heads": 32, "tied": False},
    "70B": {"width": 8192, "mlp": 28672, "blocks": 80, "heads": 64, "key_heads": 8, "tied": False},
}
"""Models of which it is only predicted what they take."""
VOCABULARY = 32000
ROOT = Path(__file__).parents[2]
PHASES = ("text writing", "block stages", "comparison")
"""Phases of which `check` says what they take."""
BY_BLOCK = "comparison, one block at a time"
"""What the comparison takes where the whole model does not fit on the device."""
STAGES = [
    {"depth": 2, "train": ["codes", "ranges"], "epochs": 1, "other_depths": {8: 1.0}},
    {"depth": 8, "train": ["codes"], "epochs": 1},
    {"train": ["routers"], "epochs": 1},
]


def config_of(shape: dict[str, Any]) -> Any:
    """The configuration of a LLaMA of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.get("vocabulary", VOCABULARY),
        hidden_size=shape["width"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["blocks"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["key_heads"],
        tie_word_embeddings=shape["tied"],
        max_position_embeddings=2048,
        dtype=shape.get("dtype", "bfloat16"),
        bos_token_id=1,
        eos_token_id=2,
    )


def make_model(name: str, folder: Path) -> None:
    """Writes a random model, with a small tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    from tests.conftest import make_tokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config_of(SHAPES[name])).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def shape_of(folder: Path) -> dict[str, Any]:
    """The shape of a LLaMA in a folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {
        "width": "hidden_size",
        "mlp": "intermediate_size",
        "blocks": "num_hidden_layers",
        "heads": "num_attention_heads",
        "key_heads": "num_key_value_heads",
        "tied": "tie_word_embeddings",
        "vocabulary": "vocab_size",
    }
    dtype = config.get("dtype") or config.get("torch_dtype")
    return {**{name: config[key] for name, key in names.items()}, "dtype": dtype}


def predicted(shape: dict[str, Any], recipe: Any, device: str = "cpu", **overrides: Any) -> dict[str, Any]:
    """What `check` says that a recipe takes on a model of a shape: its sizes, and bytes of the host and the device by phase."""
    import torch
    from transformers import LlamaForCausalLM

    from mobiq_lightning.calibration.planning import comparison_memory, memory_of_phases, sizes_of
    from mobiq_lightning.jobs import build

    job = build(recipe, **{"trainer.accelerator": "cpu", **overrides})
    config = config_of(shape)
    with torch.device("meta"):
        sizes = sizes_of(LlamaForCausalLM(config).to(config.dtype), job.model)
    phases = memory_of_phases(sizes, job.model, job.datamodule, device)
    of_block = comparison_memory(sizes, job.model, job.datamodule, device, 0)
    return {
        "sizes": sizes,
        "host": {**{p.name: p.host for p in phases}, BY_BLOCK: of_block.host},
        "device": {**{p.name: p.device for p in phases}, BY_BLOCK: of_block.device},
    }


def recipe(model: str, run: Path, text: Path) -> dict[str, Any]:
    """A calibration of block after block on few tokens, with every phase but layer gains, which take long."""
    callbacks = {
        "LayerGains": {"windows": 0},
        "LatencyCheck": {"seconds": 0},
        "ThresholdTuning": {"windows": 1, "rounds": 1},
        "Guards": {"windows": 1, "worse_block": "record", "exploding_probe": "record", "collapsed_router": "record"},
    }
    return {
        "seed_everything": 0,
        "model": {
            "pretrained": model,
            "slices": {
                "class_path": "ProgressiveSlices",
                "init_args": {"slice_bits": [2, 1, 1, 2, 2], "group_size": 64},
            },
            "router": {"class_path": "MLPRouter", "init_args": {"hidden_features": 16}},
            "budget": {"class_path": "SampledBudget", "init_args": {"low_bits": 2.0, "high_bits": 6.0}},
            "objective": {"class_path": "BlockReconstruction"},
            "stages": STAGES,
            "eval_bits": [3],
            "random_seeds": [0],
        },
        "data": {
            "source": str(text),
            "eval_source": str(text),
            "n_samples": 1,
            "n_generated": 1,
            "seq_len": 64,
            "batch_size": 1,
            "eval_seq_len": 128,
            "eval_batch_size": 1,
            "eval_max_windows": 1,
        },
        "trainer": {
            "default_root_dir": str(run),
            "accelerator": "cpu",
            "callbacks": [
                {"class_path": f"mobiq_lightning.callbacks.{name}", "init_args": arguments}
                for name, arguments in callbacks.items()
            ],
        },
    }


def measure(name: str, model: Path, scratch: Path) -> dict[str, Any]:
    """What a whole run takes."""
    path, report = scratch / "recipe.yaml", scratch / "watched.json"
    text = scratch / "text.txt"
    text.write_text(
        "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))), encoding="utf-8"
    )
    path.write_text(yaml.safe_dump(recipe(str(model), scratch / "run", text)), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "benchmarks.scaling.watch", str(path), str(report)], check=True)
    found, shape = json.loads(report.read_text(encoding="utf-8")), shape_of(model)
    return {
        "model": name,
        "shape": shape,
        "phases": found,
        "seconds_per_block": found["block stages"]["seconds"] / shape["blocks"],
        "run_folder": sum(p.stat().st_size for p in (scratch / "run").rglob("*") if p.is_file()),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of the page: weights; of each phase GB measured, GB predicted, and GB that are private; seconds of a block."""
    lines = []
    for row in rows:
        foreseen = predicted(row["shape"], recipe("random", Path("runs/unused"), Path("text.txt")))
        cells = [f"{foreseen['sizes'].model_bytes / 1e9:.2f}"]
        for phase in PHASES:
            found = row["phases"][phase]
            cells.append(
                f"{found['peak'] / 1e9:.2f}, {foreseen['host'][phase] / 1e9:.2f} ({found['private'] / 1e9:.2f})"
            )
        lines.append(f"| {row['model']} | {' | '.join(cells)} | {row['seconds_per_block']:.1f} |")
    return lines


def large() -> list[str]:
    """Rows of the page: what `recipes/llama2-7b.yaml` takes on larger models, on a GPU, by phase; host and device in GB."""
    lines = []
    for name, shape in LARGE.items():
        for where in ("host", "disk"):
            overrides = {"model.hidden_states": where, "trainer.callbacks": [], "trainer.logger": False}
            foreseen = predicted(shape, ROOT / "recipes" / "llama2-7b.yaml", "cuda", **overrides)
            cells = [
                f"{foreseen['host'][phase] / 1e9:.0f}, {foreseen['device'][phase] / 1e9:.0f}"
                for phase in (*PHASES[1:], BY_BLOCK)
            ]
            lines.append(f"| {name}, hidden states on {where} | {' | '.join(cells)} |")
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws memory of each phase and seconds of a block against the size of the model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.set_yscale("log")
    text, run = Path("text.txt"), Path("runs/unused")
    shapes = {
        name: (shape, predicted(shape, recipe("random", run, text))) for name, shape in {**SHAPES, **LARGE}.items()
    }
    weights = [found["sizes"].model_bytes / found["sizes"].itemsize for _, found in shapes.values()]
    for phase, colour in zip(PHASES, ("#8a8a8a", "#c8102e", "#1f77b4"), strict=True):
        left.plot(weights, [found["host"][phase] / 1e9 for _, found in shapes.values()], color=colour, label=phase)
    for row in rows:
        sizes = predicted(row["shape"], recipe("random", run, text))["sizes"]
        numbers, marker = sizes.model_bytes / sizes.itemsize, "o" if row["model"] in SHAPES else "s"
        for phase, colour in zip(PHASES, ("#8a8a8a", "#c8102e", "#1f77b4"), strict=True):
            left.plot(numbers, row["phases"][phase]["peak"] / 1e9, marker, color=colour)
        right.plot(sizes.sliced_of_block / 1e6, row["seconds_per_block"], marker, color="#c8102e")
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200) if t < 1.5 * max(row["seconds_per_block"] for row in rows)]
    right.set_yscale("log")
    right.set_yticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    for axes, x, y in (
        (left, "weights of the model", "GB of host memory, measured (dots, squares: SmolLM2) and predicted"),
        (right, "million weights of a block", "seconds of a block"),
    ):
        axes.set_xscale("log")
        axes.set_xlabel(x)
        axes.set_ylabel(y, fontsize=8)
        axes.grid(alpha=0.25)
    left.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, format="png", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True, help="JSON file; rows of other models in it are kept")
    parser.add_argument("--models", default=",".join(SHAPES), help="names of random models, or folders of others")
    parser.add_argument("--scratch", type=Path, help="where models and runs are made, and removed again")
    parser.add_argument(
        "--plot", type=Path, help="draw the rows that the file holds, print the tables, measure nothing"
    )
    arguments = parser.parse_args()
    from mobiq_lightning.environment import environment

    known = json.loads(arguments.to.read_text(encoding="utf-8"))["rows"] if arguments.to.is_file() else []
    if arguments.plot:
        draw(known, arguments.plot)
        print("\n".join([*table(known), "", *large()]))
        return
    for name in arguments.models.split(","):
        scratch = Path(tempfile.mkdtemp(dir=arguments.scratch))
        try:
            if name in SHAPES:
                make = (
                    f"from benchmarks.scaling.memory import *; make_model({name!r}, Path({str(scratch / 'model')!r}))"
                )
                subprocess.run([sys.executable, "-c", make], check=True)
            model = scratch / "model" if name in SHAPES else Path(name)
            row = measure(name if name in SHAPES else Path(name).name, model, scratch)
        finally:
            shutil.rmtree(scratch)
        known = [*(other for other in known if other["model"] != row["model"]), row]
        arguments.to.write_text(
            json.dumps({"environment": environment(), "rows": known}, indent=1) + "\n", encoding="utf-8"
        )
        print("\n".join(table([row])), flush=True)


if __name__ == "__main__":
    main()
