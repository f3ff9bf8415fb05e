# python -m benchmarks.latency_targets latency/latency.json [--to targets.json]
"""What the kernels are to reach on an H200, beside what `python -m mobiq_lightning latency` measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mobiq_lightning.console import table_console
from mobiq_lightning.files import write_json
from mobiq_lightning.latency.journal import Row, find

NOT_MEASURED, MISSED, GOOD, WORLD_CLASS = "not measured", "missed", "good", "world class"
_MODEL = "llama-2-7b"


@dataclass(frozen=True)
class Target:
    """One figure of the kernels, and two values that it is to reach.

    Args:
        name: What it is.
        figure: Entry of the row that holds it.
        good: At least so much is good.
        world_class: At least so much is world class.
        where: Entries of the row.
    """

    name: str
    figure: str
    good: float
    world_class: float
    where: dict[str, Any]

    def value(self, rows: Sequence[Row]) -> float | None:
        """As measured; None if it was not, or failed, or if what was measured are no kernels."""
        row = find(list(rows), path="kernels", **self.where)
        value = row.get(self.figure) if row else None
        return None if value is None else float(value)

    def verdict(self, rows: Sequence[Row]) -> str:
        """One of `NOT_MEASURED`, `MISSED`, `GOOD`, `WORLD_CLASS`."""
        value = self.value(rows)
        if value is None:
            return NOT_MEASURED
        return WORLD_CLASS if value >= self.world_class else GOOD if value >= self.good else MISSED

    def text(self, value: float | None) -> str:
        """A value as it is printed: a share of the copy bandwidth, or a multiple of plain weights' speed."""
        if value is None:
            return ""
        return f"{value:.0%}" if self.figure == "of_copy" else f"{value:.2f}x"


def _decode(part: str, bits: int) -> dict[str, Any]:
    return {"section": "decode", "shape": f"{_MODEL}.{part}", "product": "elastic", "bits": bits}


def _share(part: str, bits: int, good: float, world_class: float) -> Target:
    return Target(
        f"1 token, {part} at {bits} bits: share of copy bandwidth", "of_copy", good, world_class, _decode(part, bits)
    )


TARGETS = (
    _share("gate_up", 4, 0.65, 0.75),
    _share("down", 4, 0.65, 0.65),
    _share("qkv", 4, 0.65, 0.65),
    _share("gate_up", 2, 0.50, 0.65),
    _share("down", 2, 0.50, 0.55),
    _share("qkv", 2, 0.50, 0.55),
    Target("1 token, gate_up at 4 bits against bf16", "times_plain", 2.8, 3.2, _decode("gate_up", 4)),
    Target("1 token, gate_up at 2 bits against bf16", "times_plain", 4.0, 5.0, _decode("gate_up", 2)),
    Target(
        "16 tokens, gate_up at 4 bits against bf16", "times_plain", 2.6, 3.0,
        {"section": "batch", "shape": f"{_MODEL}.gate_up", "tokens": 16, "product": "elastic", "bits": 4},
    ),
    Target(
        "2048 tokens, dequantize + cuBLAS at 4 bits against bf16", "times_plain", 0.85, 0.88,
        {"section": "prefill", "shape": f"{_MODEL}.gate_up", "tokens": 2048, "product": "dequantized", "bits": 4},
    ),
    Target(
        "decoding LLaMA-2-7B at 2 bits against bf16", "times_plain", 2.8, 3.5,
        {"section": "model", "shape": _MODEL, "product": "elastic", "bits": 2.0},
    ),
    Target(
        "decoding LLaMA-2-7B at 4 bits against bf16", "times_plain", 2.2, 2.7,
        {"section": "model", "shape": _MODEL, "product": "elastic", "bits": 4.0},
    ),
)  # fmt: skip


def beside_targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each target with what was measured, for a file."""
    return [
        {
            "target": target.name,
            "good": target.good,
            "world_class": target.world_class,
            "measured": target.value(rows),
            "verdict": target.verdict(rows),
        }
        for target in TARGETS
    ]


def print_targets(content: dict[str, Any], output: Console) -> None:
    """Prints the targets beside what was measured; a line of it where no kernel was.

    Args:
        content: What `latency.json` holds.
        output: Where to.
    """
    if content["path"] != "kernels":
        output.print(
            f"The {len(TARGETS)} targets of the kernels, set for an H200, are not measured: they need a CUDA device.",
            highlight=False,
        )
        return
    table = Table(title=f"Targets, set for an H200; measured on {content['environment']['device']}")
    for column in ("figure", "good", "world class", "measured", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right", no_wrap=True)
    for target in TARGETS:
        verdict = target.verdict(content["rows"])
        style = {MISSED: "red", NOT_MEASURED: "dim"}.get(verdict, "green")
        measured = target.text(target.value(content["rows"]))
        bounds = (target.text(target.good), target.text(target.world_class))
        table.add_row(target.name, *bounds, measured, f"[{style}]{verdict}[/]")
    output.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency_targets", description=__doc__)
    parser.add_argument("results", type=Path, help="latency.json, as the latency command writes it")
    parser.add_argument("--to", type=Path, help="file that takes each target with what was measured, as JSON")
    chosen = parser.parse_args(arguments)
    content = json.loads(chosen.results.read_text(encoding="utf-8"))
    print_targets(content, table_console())
    if chosen.to:
        write_json(chosen.to, beside_targets(content["rows"]))


if __name__ == "__main__":
    main()
