"""Writes the model card, which says how to load a checkpoint and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mobiq_lightning.checkpoint.format import ElasticFormat
from mobiq_lightning.checkpoint.own_files import read_config
from mobiq_lightning.checkpoint.provenance import read_provenance
from mobiq_lightning.files import write_text
from mobiq_lightning.packing import WHOLE_ROW, PackedSlices, depths_of
from mobiq_lightning.runs import (
    CARD,
    RESULTS,
    HarnessEntry,
    Measured,
    Results,
    findings,
    generated_of,
    label,
    read_results,
    sentences,
    summarize,
)


def write_card(folder: Path) -> None:
    """Writes the model card README.md from config.json, provenance.json and results.json in a checkpoint's folder."""
    config, elastic = read_config(folder)
    text = card(
        str(config.get("model_type", "model")), elastic, read_provenance(folder), read_results(folder / RESULTS)
    )
    write_text(folder / CARD, text)


def card(model_type: str, elastic: ElasticFormat, origin: Mapping[str, Any], results: Results) -> str:
    """Makes the text of a model card in Markdown.

    Args:
        model_type: Family of the model, as config.json names it.
        elastic: Format of the checkpoint.
        origin: Content of provenance.json, or empty.
        results: Results that were measured so far.
    """
    depths = depths_of(tuple(elastic.slice_bits))
    highest = elastic.n_planes
    name = origin.get("source", {}).get("name", model_type)
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["mobiq", "quantized", "elastic-precision"]}
    if name.count("/") == 1 and not name.startswith(".") and not Path(name).exists():  # a hub id
        head["base_model"] = name
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {name.rstrip('/').rsplit('/', 1)[-1]}, elastic from {depths[0]} to {highest} bits\n",
        f"One checkpoint that runs at any average bit-width from {depths[0]} to {highest}, chosen at run time, token by "
        f"token. Made with MoBiQ-Lightning (MoBiQuant, arXiv 2602.20191): slices of {elastic.slice_bits} bits, "
        f"{_groups(elastic)}{_sliced(results.measured)}\n",
        _usage(depths[0], highest),
        _measured(results, highest, highest < depths[-1]),
        _guards(results.measured),
        _origin(origin),
    ]
    return "\n".join(part for part in parts if part)


def _groups(elastic: ElasticFormat) -> str:
    size, code = elastic.group_size, elastic.code
    groups = "one group per row." if size >= WHOLE_ROW else f"groups of {size}."
    if code == PackedSlices.code:
        return groups
    return f"{groups} The weights are in the {code} code, which runs on the reference alone, not on the Triton kernels."


def _sliced(measured: Measured | None) -> str:
    share = None if measured is None or measured.slices is None else measured.slices.sliced_share
    return "" if share is None else f" {share:.1%} of the weights in decoder blocks are sliced."


def _usage(lowest: int, highest: int) -> str:
    middle = (lowest + highest) / 2
    return f"""## Use

```python
import mobiq_lightning                      # pip install mobiq-lightning
from transformers import AutoTokenizer

model = mobiq_lightning.load("path/to/this/folder")      # max_bits=... reads only the first planes
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
inputs = tokenizer("Once", return_tensors="pt")
model.set_bits({middle:g})
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]), model.bits_used())
model.generate(**inputs, max_new_tokens=32, bits={lowest})   # or a tensor with a budget for each row of the batch
```
`AutoModelForCausalLM.from_pretrained` works too, **after** `import mobiq_lightning`. Without that import transformers does not
know this format: it warns of an unknown quantization type and goes on with random weights.
"""


def _measured(results: Results, highest: int, capped: bool) -> str:
    measured = results.measured
    if measured is None:
        tasks = _harness_table(results.lm_eval) if results.lm_eval else "\nNothing yet."
        return f"## Measured\n{tasks}\n"
    protocol = measured.protocol
    lines = [
        "## Measured\n",
        f"{measured.model} on {protocol.data}: {protocol.eval_protocol}, window {protocol.window}, "
        f"{protocol.n_tokens} predicted tokens.\n",
        "| allocation | target bits | used bits | all-in bits | perplexity | KL (nats) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in summarize(measured.rows):
        if row.allocation != "full" and row.target_bits > highest:
            continue
        spread = f" ± {row.spread:.2f}" if row.n_seeds > 1 else ""
        lines.append(
            f"| {label(row.allocation, measured.deployable)} | {row.target_bits:g} | {row.used_bits:.2f} | {row.all_in_bits:.2f} "
            f"| {row.perplexity:.2f}{spread} | {row.kl:.4f} |"
        )
    said = findings(row for row in measured.rows if row.target_bits <= highest or row.allocation == "full")
    lines += [f"\n{' '.join(said)}"] if said else []
    if capped:
        lines.append(
            f"\nMeasured with all planes. This file holds the first {highest} bits, so between the depths of its slices its "
            "router chooses among fewer of them."
        )
    lines += [_harness_table(results.lm_eval)] if results.lm_eval else []
    return "\n".join(lines) + "\n"


def _guards(measured: Measured | None) -> str:
    """What the guards of the calibration noticed, which whoever loads the model should know."""
    lines = [] if measured is None else sentences(measured.guards)
    return "## Noticed while it was calibrated\n\n" + "".join(f"- {line}\n" for line in lines) if lines else ""


def _harness_table(entries: Sequence[HarnessEntry]) -> str:
    lines = ["\n| task | metric | bits | used bits | value |", "|---|---|---:|---:|---:|"]
    for entry in entries:
        error = f" ± {entry.stderr:.4f}" if entry.stderr is not None else ""
        used = f"{entry.used_bits:.2f}" if entry.used_bits is not None else ""
        lines.append(f"| {entry.task} | {entry.metric_text} | {entry.bits_text} | {used} | {entry.value:.4f}{error} |")
    return "\n".join(lines)


def _origin(origin: Mapping[str, Any]) -> str:
    if not origin:
        return ""
    source, calibration, versions = origin["source"], origin["calibration"], origin["environment"]
    return f"""## Provenance

| | |
|---|---|
| source model | {source["name"]}, weights {source["weights"]} |
| calibration | {calibration["n_samples"]} windows of {calibration["seq_len"]} tokens of {calibration["data"]}\
{generated_of(calibration)}, data hash {calibration["data_hash"]} |
| seed | {origin["seed"]} |
| code | mobiq-lightning {versions["mobiq_lightning"]}, commit {origin["git_commit"] or "unknown"} |
| versions | torch {versions["torch"]}, transformers {versions["transformers"]}, Python {versions["python"]} |
| made | {versions["date"]} on {versions["device"]} |

The recipe is `recipe.yaml`; `python -m mobiq_lightning verify` checks every file against `hashes.json`.
"""
