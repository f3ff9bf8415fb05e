# python -m benchmarks.overview
"""Draws the figure of the README from committed rows: one elastic checkpoint beside peers calibrated for each bit-width."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "peers-tinystories.json"
IMAGE = ROOT / "docs" / "images" / "perplexity-against-bits.png"
GROUP_SIZE = 64
PEERS = {
    "RTN": ("rounding to nearest", "X", "#8a8a8a"),
    "HQQ": ("HQQ", "P", "#9467bd"),
    "GPTQ, clipped": ("GPTQ", "s", "#1f77b4"),
    "AutoRound": ("AutoRound", "^", "#2ca02c"),
    "Qronos (quark)": ("Qronos", "D", "#e08a00"),
}
"""Peers by their name in the rows, each with its name, marker and colour in the figure."""
UNCALIBRATED = {"RTN", "HQQ"}
"""Peers that look at the weights alone."""
OURS = "#c8102e"
TICKS = (25, 30, 40, 60, 100, 200, 300)


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_yscale("log")
    curves(axes, found)
    axes.set_yticks(TICKS, [str(tick) for tick in TICKS])
    axes.minorticks_off()
    axes.set_ylim(23.5, 340)
    axes.set_xlabel("bits read per weight, mean over tokens (scales and zero points left out)")
    axes.set_ylabel("perplexity, lower is better")
    axes.set_title(f"TinyStories-656K, weights in groups of {GROUP_SIZE}", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1.0, 1.0))
    # On the scale of the whole figure all that is known at 4 bits lies on one spot, and who is ahead cannot be seen.
    zoom = axes.inset_axes((0.46, 0.17, 0.51, 0.32))
    curves(zoom, found)
    zoom.set_xlim(3.7, 4.3)
    zoom.set_ylim(24.3, 26.0)
    zoom.set_xticks([3.8, 4.0, 4.2])
    zoom.tick_params(labelsize=8)
    zoom.set_title("around 4 bits", fontsize=9)
    zoom.grid(alpha=0.25)
    axes.indicate_inset_zoom(zoom, edgecolor="#888888")
    figure.savefig(path, dpi=130, format="png", metadata={"Software": None})


def curves(axes: Any, found: dict[str, Any]) -> None:
    full = found["full precision"]
    axes.axhline(full, color="#444444", linewidth=1.2, linestyle="--", label=f"full precision ({full:.1f})")
    for name, (label, marker, color) in PEERS.items():
        rows = [r for r in found["means"] if (r["peer"], r["group_size"]) == (name, GROUP_SIZE)]
        axes.plot(
            [r["bits"] for r in rows], [r["perplexity"] for r in rows], marker, color=color, markersize=8,
            label=label if name in UNCALIBRATED else f"{label}, calibrated for each bit-width alone",
        )  # fmt: skip
    ours = [r for r in found["elastic"] if r["group_size"] == GROUP_SIZE]
    axes.plot(
        [r["used_bits"] for r in ours], [r["perplexity"] for r in ours], "-o", color=OURS, linewidth=2.2, markersize=5,
        label="this project, one checkpoint for all of them", zorder=3,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS, help="a peers.json of benchmarks.quality.peers")
    parser.add_argument("--to", type=Path, default=IMAGE, help="the PNG")
    arguments = parser.parse_args()
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(arguments.rows.read_text(encoding="utf-8")), arguments.to)
    print(arguments.to)


if __name__ == "__main__":
    main()
