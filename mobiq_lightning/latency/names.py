"""What `latency` can be asked for by name, known without importing anything heavy."""

from __future__ import annotations

import re

from mobiq_lightning.errors import RecipeError, nearest, shown

SECTIONS = ("check", "ceilings", "decode", "batch", "prefill", "model")
PARTS = ("qkv", "o", "gate_up", "down")
"""Inputs of a decoder block whose products are timed."""
SIZES = {
    "llama-2-7b": (4096, 4096, 11008),
    "llama-3-8b": (4096, 1024, 14336),
    "llama-3-70b": (8192, 1024, 28672),
    "small": (1024, 1024, 2816),
}
"""By name of a model: its hidden features, those of keys and values together, and those of its MLP."""
MOST_WEIGHTS = 2**31
"""Weights of the largest product that is timed."""


def check_names(run: str, shapes: str, sections: str) -> None:
    """Checks what a command line names, as far as that does not depend on the device.

    Args:
        run: Run folder, elastic checkpoint or hub id whose shapes are taken, or empty.
        shapes: Names of shapes, separated by commas, or empty.
        sections: Names of sections, separated by commas, or empty.

    Raises:
        RecipeError: If both a run and shapes are given, or a name is none.
    """
    if run and shapes:
        raise RecipeError("latency: give a run, whose shapes are taken, or --shapes, not both")
    for name in split(sections):
        if name not in SECTIONS:
            hint = nearest(name, SECTIONS)
            raise RecipeError(f"latency: --sections: no section {shown(name)}. {hint} Sections: {', '.join(SECTIONS)}")
    for name in split(shapes):
        sizes_of(name)


def split(names: str) -> list[str]:
    """Names that are separated by commas."""
    return [part.strip() for part in names.split(",") if part.strip()]


def sizes_of(name: str) -> tuple[int, int] | None:
    """Rows and columns of a shape that is named by them, as in ``4096x4096``; None for one of a known model.

    Raises:
        RecipeError: If there is no such shape, or it is too large.
    """
    if sizes := re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", name):
        rows, columns = int(sizes[1]), int(sizes[2])
        if not rows or not columns:
            raise RecipeError(f"latency: --shapes {name}: rows and columns must be at least 1")
        if rows * columns > MOST_WEIGHTS:
            raise RecipeError(
                f"latency: --shapes {name}: {rows * columns:,} weights; at most {MOST_WEIGHTS:,} are timed"
            )
        return rows, columns
    known = [*SIZES, *(f"{model}.{part}" for model in SIZES for part in PARTS)]
    if name not in known:
        raise RecipeError(
            f"latency: --shapes: no shape {shown(name)}. {nearest(name, known)} There are {', '.join(SIZES)}, one part of them "
            "as in llama-2-7b.down, and ROWSxCOLUMNS"
        )
    return None
