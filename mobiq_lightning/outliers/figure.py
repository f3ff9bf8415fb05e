"""Draws the figure of outlier migration: which tokens are worst at one precision and which at another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from mobiq_lightning.outliers.findings import ALL, NONE
from mobiq_lightning.outliers.overlap import worst_tokens
from mobiq_lightning.outliers.token_record import TokenRecord

_POINTS = 6000  # more would be one blot
_SMALLEST_KL = 1e-12
_KINDS = {
    "elastic": ("one checkpoint", "o", "#c8102e"),
    "own_calibration": ("each calibrated alone", "s", "#1f77b4"),
    "uncalibrated": ("uncalibrated", "^", "#8c8c8c"),
}
_LABELS = {ALL: "all at once", NONE: "uncalibrated"}


def plot_outliers(found: dict[str, Any], record: TokenRecord, path: Path) -> None:
    """Draws outlier migration as a PNG: overlap of the worst tokens, errors at two precisions, and overlap by place.

    Where calibrations for single precisions were measured, a fourth panel shows the matrix of their perplexities.

    Args:
        found: Figures as they are written to outliers.json.
        record: Errors of every token, read by the elastic checkpoint.
        path: PNG file that is written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with_matrix = "matrix" in found
    figure = Figure(figsize=(12, 10) if with_matrix else (16, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).flatten() if with_matrix else figure.subplots(1, 3)
    tokens = found["tokens"]
    _draw_overlap(axes[0], tokens["elastic"])
    _draw_errors(axes[1], record, found["share"])
    _draw_pairs(axes[2], tokens)
    if with_matrix:
        _draw_matrix(axes[3], found["matrix"])
    protocol = found["protocol"]
    figure.suptitle(
        f"Outlier migration: {found['model']} on {protocol['data']}, {protocol['n_tokens']} predicted tokens"
    )
    figure.savefig(path, format="png")


def _draw_overlap(axes: Any, elastic: dict[str, Any]) -> None:
    bits = elastic["bits"]
    values = [[_of_pair(elastic["model"]["overlap"], one, other) for other in bits] for one in bits]
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color="white" if value < 0.6 else "black")
    _name_ticks(axes, bits, bits)
    axes.set(
        xlabel="bits",
        ylabel="bits",
        title=f"(a) worst {elastic['share']:.0%} of tokens (KL) shared,\none checkpoint; chance {elastic['chance']:.0%}",
    )
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _of_pair(values: dict[str, float], one: int, other: int) -> float:
    return 1.0 if one == other else values[f"{one}-{other}" if f"{one}-{other}" in values else f"{other}-{one}"]


def _draw_errors(axes: Any, record: TokenRecord, share: float) -> None:
    """Draws every token's KL at two precisions, with the worst at either in colour."""
    first = 0
    second = record.bits.index(4) if 4 in record.bits[1:] else len(record.bits) - 1
    kl = record.kl[[first, second]][:, record.compared]
    worst = worst_tokens(kl, share)
    low, high = record.bits[first], record.bits[second]
    shown = torch.zeros(kl.shape[1], dtype=torch.bool)
    shown[:: max(1, kl.shape[1] // _POINTS)] = True
    kinds = {
        "neither": (~worst[0] & ~worst[1], "#c4c4c4"),
        f"worst at {low} bits alone": (worst[0] & ~worst[1], "#1f77b4"),
        f"worst at {high} bits alone": (worst[1] & ~worst[0], "#c8102e"),
        "worst at both": (worst[0] & worst[1], "#2d2d2d"),
    }
    for label, (chosen, color) in kinds.items():
        x, y = kl[:, chosen & shown].clamp_min(_SMALLEST_KL).tolist()
        axes.scatter(x, y, s=5, color=color, label=label, linewidths=0, rasterized=True)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"KL at {low} bits (nats)",
        ylabel=f"KL at {high} bits (nats)",
        title=f"(b) a token at {low} and at {high} bits,\none checkpoint",
    )
    axes.set_xlim(left=float(kl[0].clamp_min(_SMALLEST_KL).quantile(0.001)) / 2)
    axes.set_ylim(bottom=float(kl[1].clamp_min(_SMALLEST_KL).quantile(0.001)) / 2)
    axes.legend(markerscale=3, fontsize=8, loc="upper left")
    axes.grid(True, alpha=0.25)


def _draw_pairs(axes: Any, tokens: dict[str, Any]) -> None:
    """Draws the overlap by pair of precisions, in the logits and at the inputs."""
    elastic = tokens["elastic"]
    pairs = list(elastic["model"]["overlap"])
    for kind, (label, marker, color) in _KINDS.items():
        if kind in tokens:
            values = tokens[kind]["model"]["overlap"]
            axes.plot(range(len(pairs)), [values[p] for p in pairs], marker, color=color, label=f"model (KL), {label}")
    if elastic["inputs"]:
        per_input = [[found["overlap"][pair] for found in elastic["inputs"].values()] for pair in pairs]
        axes.boxplot(per_input, positions=range(len(pairs)), whis=(0, 100), widths=0.5)
    if "same_bits" in tokens:
        control = tokens["same_bits"].values()
        axes.axhspan(
            min(control), max(control), color="#f2d48f", alpha=0.5, label="same bits: own calibration and none"
        )
    axes.axhline(elastic["chance"], color="black", linestyle=":", linewidth=1, label="chance")
    axes.set_xticks(range(len(pairs)), pairs)
    axes.set(
        ylim=(0, 1.2),  # room for the legend
        xlabel="pair of precisions (bits)",
        ylabel="share of the worst tokens in common",
        title="(c) overlap in the logits, and at the inputs of the linears\n(boxes: quartiles and range over inputs)",
    )
    axes.legend(fontsize=7, loc="upper left", ncols=2)
    axes.grid(True, axis="y", alpha=0.25)


def _draw_matrix(axes: Any, matrix: dict[str, Any]) -> None:
    """Draws the perplexity of each calibration relative to the one made for the precision that it is used at."""
    rows = matrix["rows"]
    used = list(dict.fromkeys(row["used_at"] for row in rows))
    calibrations = list(dict.fromkeys(row["calibrated_at"] for row in rows))
    logs = [[math.log1p(r["change"]) for r in rows if r["calibrated_at"] == c] for c in calibrations]
    # So that a few percent show beside calibrations that ruin a precision.
    shades = [[math.copysign(abs(value) ** 0.5, value) for value in line] for line in logs]
    limit = max(0.2, *(abs(shade) for line in shades for shade in line))
    axes.imshow(shades, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for place, row in enumerate(rows):
        y, x = divmod(place, len(used))
        own = row["calibrated_at"] == row["used_at"]
        text = f"{row['perplexity']:.2f}" + ("" if own else f"\n{row['change']:+.1%}")
        color = "white" if abs(shades[y][x]) > 0.6 * limit else "black"
        axes.text(x, y, text, ha="center", va="center", fontsize=8, color=color, weight="bold" if own else "normal")
    _name_ticks(axes, used, [_LABELS.get(c, str(c)) for c in calibrations])
    axes.set(
        xlabel="used at (bits)",
        ylabel="calibrated at (bits)",
        title="(d) perplexity, and its change against the calibration\n"
        f"made for the bits it is used at; full precision {matrix['full_perplexity']:.2f}",
    )


def _name_ticks(axes: Any, columns: list[Any], rows: list[Any]) -> None:
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
