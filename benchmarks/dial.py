# python -m benchmarks.dial runs/tiny --to dial.json --plot dial.png
"""Sweeps the dial of a finished run: bits read against bits asked for, on calibration and on held-out text, and quality."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobiq_lightning import load
from mobiq_lightning.environment import environment
from mobiq_lightning.evaluation.metrics import KLDivergence, Perplexity, log_probabilities
from mobiq_lightning.jobs.running import build
from mobiq_lightning.sources import IGNORED, load_source, pad_windows

CALIBRATION_WINDOWS = 16
"""Windows that thresholds are tuned on by default, the first ones."""


def batches_of(run: Path, n_windows: int) -> tuple[Any, dict[str, list[dict[str, Tensor]]]]:
    """The source model of a run, and batches ``input_ids`` (B, T), ``labels`` (B, T) of both texts."""
    job = build(run / "config.yaml", **{"data.n_generated": 0})
    source = load_source(job.model.pretrained, job.model.dtype_name)
    text = job.datamodule
    text.read(source.tokenizer, source.tokenizer_hash, "fit")
    assert text.evaluation is not None
    calibration = text.calibration_ids()[:CALIBRATION_WINDOWS]
    held_out = [text.evaluation[i] for i in range(len(text.evaluation))]
    held_out = held_out[:: max(1, len(held_out) // n_windows)][:n_windows]  # sorted by length: some of all lengths
    size = text.eval_batch_size
    return source.model, {
        "calibration": [{"input_ids": calibration, "labels": calibration}],
        "held out": [pad_windows(held_out[i : i + size]) for i in range(0, len(held_out), size)],
    }


@torch.no_grad()
def measure(
    model: Any, source: Any, batches: list[dict[str, Tensor]], budgets: list[float], scope: str
) -> list[dict[str, float]]:
    """For each budget the bits read, the KL divergence in nats and the perplexity."""
    known = [log_probabilities(_predictions(source, batch)) for batch in batches]
    rows = []
    for bits in budgets:
        kl, perplexity = KLDivergence(), Perplexity()
        model.set_bits(bits, scope)
        for batch, reference in zip(batches, known, strict=True):
            log_probs = log_probabilities(_predictions(model, batch))
            kl.update(log_probs, reference)
            perplexity.update(log_probs, batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORED])
        used = model.bits_used().code_bits
        rows.append(
            {"bits": bits, "used_bits": used, "kl": float(kl.compute()), "perplexity": float(perplexity.compute())}
        )
    return rows


def _predictions(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits (N, V) of the tokens that are followed by another; padding is told to the model, which does not count it."""
    scored = batch["labels"][:, 1:] != IGNORED
    mask = (batch["labels"] != IGNORED).long()
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits[:, :-1][scored]
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run folder of a finished run")
    parser.add_argument("--step", type=float, default=0.02, help="distance in bits between budgets")
    parser.add_argument("--windows", type=int, default=32, help="windows of held-out text")
    parser.add_argument("--scopes", nargs="+", default=["layer", "global"], choices=["layer", "global"])
    parser.add_argument("--max_bits", type=int, help="load only the first so many bits of each weight")
    parser.add_argument("--to", type=Path, help="JSON file for the rows")
    parser.add_argument("--plot", type=Path, help="PNG file for the plot")
    arguments = parser.parse_args()
    source, texts = batches_of(arguments.run, arguments.windows)
    model = load(arguments.run, max_bits=arguments.max_bits)
    lowest, highest = model.dial.lowest, model.dial.highest
    count = round((highest - lowest) / arguments.step)
    budgets = [round(lowest + (highest - lowest) * i / count, 6) for i in range(count + 1)]
    found: dict[str, Any] = {
        "run": arguments.run.name,
        "step": arguments.step,
        "environment": environment(),
        "sweeps": [],
    }
    for scope in arguments.scopes:
        for name, batches in texts.items():
            rows = measure(model, source, batches, budgets, scope)
            miss = max(rows, key=lambda row: abs(row["used_bits"] - row["bits"]))
            worse = sum(row["kl"] > 1.002 * min(r["kl"] for r in rows[: i + 1]) for i, row in enumerate(rows))
            n_tokens = model.bits_used().n_tokens
            print(
                f"{scope:>6}, {name:>11} ({n_tokens} tokens): largest miss {abs(miss['used_bits'] - miss['bits']):.3f} at "
                f"{miss['bits']:g} bits, within 0.03 {sum(abs(r['used_bits'] - r['bits']) <= 0.03 for r in rows)} of "
                f"{len(rows)}; {worse} budgets are worse than a lower one",
                flush=True,
            )
            found["sweeps"].append({"scope": scope, "text": name, "n_tokens": n_tokens, "rows": rows})
    if arguments.to:
        arguments.to.write_text(as_json(found), encoding="utf-8")
    if arguments.plot:
        draw(found, arguments.plot)


def as_json(found: dict[str, Any]) -> str:
    """The sweeps as JSON, a row of figures to a line."""
    head = json.dumps({key: value for key, value in found.items() if key != "sweeps"}, indent=1)[:-2]
    sweeps = []
    for sweep in found["sweeps"]:
        rows = ",\n  ".join(json.dumps({key: round(value, 6) for key, value in row.items()}) for row in sweep["rows"])
        about = json.dumps({key: value for key, value in sweep.items() if key != "rows"})[:-1]
        sweeps.append(f'{about}, "rows": [\n  {rows}]}}')
    listed = ",\n".join(sweeps)
    return f'{head},\n "sweeps": [\n{listed}]\n}}\n'


def draw(found: dict[str, Any], path: Path) -> None:
    """Draws the miss and the KL divergence of each sweep against the bits asked for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    miss, quality = figure.subplots(2, sharex=True)
    for sweep in found["sweeps"]:
        rows, style = sweep["rows"], "-" if sweep["text"] == "calibration" else ":"
        color = "#c8102e" if sweep["scope"] == "global" else "#1f77b4"
        name = f"{sweep['scope']}, {sweep['text']} text"
        bits = [row["bits"] for row in rows]
        miss.plot(bits, [row["used_bits"] - row["bits"] for row in rows], style, color=color, linewidth=1, label=name)
        quality.plot(bits, [row["kl"] for row in rows], style, color=color, linewidth=1, label=name)
    miss.axhspan(-0.03, 0.03, color="#cccccc", alpha=0.5)
    miss.set_ylabel("bits read minus bits asked for")
    quality.set_ylabel("KL to full precision, nats (log scale)")
    quality.set_yscale("log")
    quality.set_xlabel("bits asked for")
    miss.legend(fontsize=8)
    for axes in (miss, quality):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})


if __name__ == "__main__":
    main()
