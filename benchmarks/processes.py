# python -m benchmarks.processes --folder runs/processes --to processes.json
"""Calibrates the built-in model in 1, 2 and 4 processes that share each batch, and compares what they have learned."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mobiq_lightning.environment import environment

TOTAL = 4
"""Windows of a step, of all processes together."""
STAGES = (
    "{depth: 2, train: [codes, ranges], epochs: 1, other_depths: {8: 1.0}}, {depth: 3, train: [codes], epochs: 1}, "
    "{depth: 4, train: [codes], epochs: 1}, {depth: 6, train: [codes], epochs: 1, lr_scale: 0.7}, "
    "{train: [routers], epochs: 1}, {train: [routers], epochs: 1, scope: model}"
)
RECIPE = [
    "--config=recipes/tiny.yaml",
    f"--model.stages=[{STAGES}]",
    "--model.eval_bits=[2, 2.5, 3, 4, 8]",
    "--model.random_seeds=[0]",
    "--data.n_samples=64",
    "--data.n_generated=0",
    "--data.eval_batch_size=4",
    "--data.eval_max_windows=32",
    "--trainer.accelerator=cpu",
    "--trainer.callbacks=[{class_path: mobiq_lightning.callbacks.LatencyCheck, init_args: {seconds: 0}}]",
]


def fit(folder: Path, processes: int) -> float:
    """Runs the recipe in so many processes and gives the seconds that it took."""
    shared = [f"--trainer.devices={processes}", "--trainer.strategy=ddp_find_unused_parameters_true"]
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=29517", "-m"]
    command += ["mobiq_lightning", "fit", *RECIPE, f"--data.batch_size={TOTAL // processes}"]
    command += [*(shared if processes > 1 else []), f"--trainer.default_root_dir={folder}", "--overwrite"]
    started = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - started


def tensors_of(run: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint of a run."""
    files = sorted((run / "elastic").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def difference(run: Path, single: Path) -> dict[str, Any]:
    """How far a run is from that of one process: bytes of codes that differ, and relative differences of figures at most."""
    one, other = tensors_of(single), tensors_of(run)
    codes = [name for name in one if "plane_" in name]
    differing = sum(int((one[name] != other[name]).sum()) for name in codes)
    rows = [json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"] for folder in (single, run)]
    pairs = list(zip(*rows, strict=True))
    files = [json.loads((folder / "layer_gains.json").read_text(encoding="utf-8"))["rows"] for folder in (single, run)]
    method = "probes" if "probes" in files[0][0] else "gradients"
    gains = torch.tensor([[row[method] for row in file] for file in files], dtype=torch.float64)
    router = [(a, b) for a, b in pairs if a["allocation"] == "router"]
    return {
        "code_bytes": sum(one[name].numel() for name in codes),
        "code_bytes_that_differ": differing,
        "ranges": _largest(one, other, "slice_"),
        "routers": _largest(one, other, ".router."),
        "layer_gains": float((gains[1] - gains[0]).abs().max() / gains[0].abs().max()),
        "perplexity_at_depths": _rows(pairs, lambda row: row["target_bits"] in (2, 8, 32)),
        "perplexity": _rows(router, lambda row: True),
        "kl": max(abs(b["kl"] / a["kl"] - 1) for a, b in router),
        "used_bits": max(abs(b["used_bits"] - a["used_bits"]) for a, b in router),
    }


def _largest(one: dict[str, Tensor], other: dict[str, Tensor], part: str) -> float:
    """The largest difference of tensors whose names hold a text, relative to the largest value of each."""
    pairs = [(one[name].float(), other[name].float()) for name in one if part in name]
    return max((float((b - a).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs), default=0.0)


def _rows(pairs: list[tuple[dict[str, Any], dict[str, Any]]], wanted: Any) -> float:
    """The largest relative difference of the perplexity of some rows."""
    return max(abs(b["perplexity"] / a["perplexity"] - 1) for a, b in pairs if wanted(a))


def main() -> None:
    """Runs, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the runs")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[2, 4], help="beside one, each with its part of a batch"
    )
    parser.add_argument("--to", type=Path, help="JSON file")
    given = parser.parse_args()
    single = given.folder / "1"
    found: dict[str, Any] = {"seconds": {"1": round(fit(single, 1), 1)}, "runs": {}}
    for count in given.processes:
        folder = given.folder / str(count)
        found["seconds"][str(count)] = round(fit(folder, count), 1)
        found["runs"][str(count)] = difference(folder, single)
        print(count, json.dumps(found["runs"][str(count)]), flush=True)
    if given.to:
        given.to.write_text(json.dumps({"environment": environment(), **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
