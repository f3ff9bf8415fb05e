# python -m benchmarks.block_inputs --folder runs/block_inputs --to block_inputs.json
"""What it costs to calibrate blocks from full-precision inputs: the built-in model either way, with several seeds."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from mobiq_lightning.environment import environment

INPUTS = ("calibrated", "full")
STAGES = {
    "block stages alone": (
        "{depth: 2, train: [codes, ranges], epochs: 3, other_depths: {8: 1.0}}, {depth: 3, train: [codes], epochs: 2}, "
        "{depth: 4, train: [codes], epochs: 1}, {depth: 6, train: [codes], epochs: 1}, "
        "{depth: 8, train: [codes], epochs: 1}, {train: [routers], epochs: 2}"
    ),
    "with model stages": "",  # those of the recipe
}
"""What is trained when: by name, `model.stages`; empty: as recipes/tiny.yaml has it."""
BITS = [2, 2.5, 3, 3.5, 4, 6, 8]
RECIPE = [
    "--config=recipes/tiny.yaml",
    f"--model.eval_bits={BITS}",
    "--model.random_seeds=[]",
    "--data.n_samples=64",
    "--data.n_generated=0",
    "--data.eval_max_windows=64",
    "--trainer.accelerator=cpu",
    "--trainer.callbacks=[{class_path: mobiq_lightning.callbacks.LatencyCheck, init_args: {seconds: 0}}, "
    "{class_path: mobiq_lightning.callbacks.LayerGains, init_args: {windows: 0}}]",
]


def fit(folder: Path, stages: str, inputs: str, seed: int) -> list[dict[str, Any]]:
    """Runs the recipe, or shows what it has measured; gives the rows of the full-precision model and of the router."""
    keys = [f"--model.block_inputs={inputs}", f"--seed_everything={seed}", f"--data.seed={seed}"]
    keys += [f"--model.stages=[{stages}]"] if stages else []
    command = [sys.executable, "-m", "mobiq_lightning", "fit", *RECIPE, *keys, f"--trainer.default_root_dir={folder}"]
    subprocess.run(command, check=True)
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["allocation"] in ("full", "router")]


def main() -> None:
    """Runs what is not there yet, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--to", type=Path, help="JSON file")
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    for seed in given.seeds:
        for name, stages in STAGES.items():
            for inputs in INPUTS:
                folder = given.folder / f"{name.replace(' ', '-')}-{inputs}-{seed}"
                for row in fit(folder, stages, inputs, seed):
                    kept = {key: row[key] for key in ("target_bits", "used_bits", "perplexity", "kl")}
                    found.append({"stages": name, "block_inputs": inputs, "seed": seed, **kept})
    if given.to:
        content = json.dumps({"environment": environment(), "rows": found}, indent=1)
        given.to.write_text(content + "\n", encoding="utf-8")
    for line in table(found):
        print(line)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table in Markdown: means over seeds, and how much `full` is above `calibrated`, least and most of the seeds."""
    figures = [f"{figure}, {inputs}" for figure in ("perplexity", "KL") for inputs in INPUTS]
    columns = ["stages", "bits", *figures[:2], "change", *figures[2:], "change"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in STAGES:
        for bits in BITS:
            cells = []
            for figure, digits in (("perplexity", 3), ("kl", 4)):
                pairs = [
                    [row[figure] for row in rows if (row["stages"], row["block_inputs"], row["target_bits"]) == key]
                    for key in ((name, inputs, bits) for inputs in INPUTS)
                ]
                if not all(pairs):
                    continue
                changes = [100 * (b / a - 1) for a, b in zip(*pairs, strict=True)]
                spread = f"{min(changes):+.1f} to {max(changes):+.1f} %"
                cells += [*(f"{statistics.mean(values):.{digits}f}" for values in pairs), spread]
            if cells:
                lines.append(f"| {name} | {bits:g} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
