"""Arithmetic of the table: means over seeds, the best peer, and what our one checkpoint has to reach against it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .rows import DONE

TARGETS = {2: 0.85, 3: 0.99, 4: 0.995}
"""Perplexity of one elastic checkpoint, as a share of the best peer's that was calibrated for those bits alone."""
NEAR = 0.05
"""How far the bits that a router used may lie from those of the peer it is held against."""


def means(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of different seeds as one: mean, sample standard deviation, number of seeds. NaN and infinity stay."""
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == DONE:
            groups.setdefault((row["peer"], row["bits"], row["group_size"]), []).append(row)
    found = []
    for (peer, bits, group_size), group in groups.items():
        values = [row["perplexity"] for row in group]
        found.append({
            "peer": peer, "bits": bits, "group_size": group_size, "ours": group[0].get("ours", False),
            "perplexity": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
            "kl": mean_kl(group),
            "seeds": sorted(row["seed"] for row in group if row["seed"] is not None), "n": len(values),
        })  # fmt: skip
    return found


def mean_kl(rows: Sequence[dict[str, Any]]) -> float | None:
    """Mean KL divergence of rows, in nats per token; None if one was measured before it was."""
    values = [row.get("kl") for row in rows]
    return None if None in values else statistics.fmean(value for value in values if value is not None)


def best_peer(averaged: Iterable[dict[str, Any]], bits: int, group_size: int) -> dict[str, Any] | None:
    """The lowest mean at these bits and this group size, whoever's it is; None if nothing ran."""
    here = [row for row in averaged if (row["bits"], row["group_size"]) == (bits, group_size)]
    finite = [row for row in here if math.isfinite(row["perplexity"])]
    return min(finite, key=lambda row: row["perplexity"], default=None)


def read_elastic(folder: Path, data_hash: str | None) -> list[dict[str, Any]]:
    """The router's rows of a finished run, with its group size.

    Args:
        folder: The run folder.
        data_hash: Of the evaluation text that the peers were measured on.

    Raises:
        ValueError: If the run was measured on another text, or is not finished.
    """
    results_path, config_path = folder / "results.json", folder / "elastic" / "config.json"
    for path in (results_path, config_path):
        if not path.is_file():
            raise ValueError(f"--elastic {folder}: there is no {path}; give the folder of a finished run")
    results = json.loads(results_path.read_text(encoding="utf-8"))
    config = json.loads(config_path.read_text(encoding="utf-8"))
    found = results["protocol"]["data_hash"]
    if data_hash is not None and found != data_hash:
        raise ValueError(f"--elastic {folder}: was measured on other text (hash {found}, the peers' {data_hash})")
    group_size = int(config["quantization_config"]["group_size"])
    return [
        {
            "run": folder.name,
            "group_size": group_size,
            **{key: row[key] for key in ("target_bits", "used_bits", "perplexity")},
            "kl": row.get("kl"),
        }
        for row in results["rows"]
        if row["allocation"] == "router"
    ]


def elastic_means(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the runs, at each group size and budget."""
    groups: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["group_size"], row["target_bits"]), []).append(row)
    found = []
    for (group_size, target), group in sorted(groups.items()):
        values = [row["perplexity"] for row in group]
        found.append({
            "group_size": group_size, "target_bits": target, "n": len(values),
            "used_bits": statistics.fmean(row["used_bits"] for row in group),
            "perplexity": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
            "kl": mean_kl(group),
        })  # fmt: skip
    return found


def verdicts(
    averaged: Sequence[dict[str, Any]],
    elastic: Sequence[dict[str, Any]],
    bits: Iterable[int],
    group_sizes: Iterable[int],
) -> list[dict[str, Any]]:
    """For each group size and precision, the best peer, the target and, where there are elastic runs, whether it is met."""
    found = []
    for group_size in group_sizes:
        for b in bits:
            best = best_peer(averaged, b, group_size)
            if best is None or b not in TARGETS:
                continue
            target = TARGETS[b] * best["perplexity"]
            ours = next((r for r in elastic if (r["group_size"], r["target_bits"]) == (group_size, b)), None)
            verdict: dict[str, Any] = {
                "group_size": group_size, "bits": b, "best_peer": best["peer"], "best": best["perplexity"], "n": best["n"],
                "share": TARGETS[b], "target": target, "ours": None, "ratio": None, "met": None,
            }  # fmt: skip
            if ours is not None and abs(ours["used_bits"] - b) <= NEAR:
                ratio = ours["perplexity"] / best["perplexity"]
                verdict |= {"ours": ours["perplexity"], "ratio": ratio, "met": ours["perplexity"] <= target}
            found.append(verdict)
    return found
