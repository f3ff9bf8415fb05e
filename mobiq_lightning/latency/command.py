"""Carries out the command ``python -m mobiq_lightning latency``."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mobiq_lightning.console import say
from mobiq_lightning.environment import environment
from mobiq_lightning.errors import KernelError, RecipeError
from mobiq_lightning.files import write_atomically
from mobiq_lightning.kernels import missing_for_code, missing_for_kernels
from mobiq_lightning.latency import report, sections
from mobiq_lightning.latency.journal import PLOT, RESULTS, Journal
from mobiq_lightning.latency.names import SECTIONS, check_names, split
from mobiq_lightning.latency.shapes import Shape, parse_shapes, shapes_of_checkpoint
from mobiq_lightning.latency.timing import CACHES, MAX_COPIES, Clock, cache_bytes
from mobiq_lightning.latency.whole_model import model

CUDA_ONLY = ("check", "prefill")
DEFAULT_SHAPES = {"kernels": "llama-2-7b,llama-3-8b,llama-3-70b", "reference": "small"}
REFERENCE = "the CPU reference, which says nothing of GPUs"
KERNELS = "the Triton kernels, without the router"
_NOTES = {
    "kernels": [
        "Weights and tokens are random. An odd depth reads the whole unit of two planes that its last bit is in.",
        "The product alone is timed; preparation, which the router's launch does in a model, stands for itself.",
    ],
    "reference": [
        "These figures are those of the reference path on this CPU and say nothing of GPUs. Weights and tokens are random.",
        "A model keeps its dequantized weights, so bits change nothing of what one depth reads; mixed depths read one each.",
    ],
}


def measure(
    run: str = "", shapes: str = "", names: str = "", folder: Path = Path("latency"), minutes: float = 9.0
) -> Journal:
    """Times products with sliced weights on this machine, prints tables, and writes latency.json and latency.png.

    Args:
        run: Run folder or elastic checkpoint whose shapes are taken, or empty.
        shapes: Names of shapes such as ``llama-2-7b`` or ``4096x4096``, separated by commas; or empty.
        names: Names of sections, separated by commas; by default all that the device has.
        folder: Folder that the files are written to.
        minutes: Minutes after which no more is measured; what is left then is listed as not measured.

    Returns:
        The journal with all measured rows.

    Raises:
        RecipeError: If an argument makes no sense.
        KernelError: If the kernels are wrong here, or a measurement failed; the others are written all the same.
    """
    path, products = find_path()
    wanted = chosen_sections(names, path)
    if not 0 < minutes < math.inf:
        raise RecipeError(f"latency: --minutes {minutes:g} must be above 0")
    listed = chosen_shapes(run, shapes, path)
    clock = Clock(products.device)
    what = KERNELS if path == "kernels" else REFERENCE
    head: dict[str, Any] = {"what": what, "notes": _NOTES[path], "environment": versions()}
    head["method"] = _method(products.device, products.dtype)
    journal = Journal(folder, path, head, clock, time.monotonic() + 60 * minutes)
    say(f"Measuring {what}: {', '.join(wanted)}; at most {minutes:g} minutes, rows go to {folder / RESULTS}")
    try:
        for name in wanted:
            _run_section(name, journal, products, listed)
    finally:
        journal.save()  # what is known is on disk even if the first section failed
    if report.has_plot(journal.rows):
        write_atomically(folder / PLOT, lambda file: report.plot(journal.content, file))
    report.print_report(journal)
    failed = [row for row in journal.rows if "error" in row]
    if failed:
        first = failed[0]
        raise KernelError(
            f"{len(failed)} of {len(journal.rows)} measurements failed, the first of them {first['section']} of "
            f"{first['shape']}, {first['product']}: {first['error']}"
        )
    return journal


def find_path() -> tuple[str, sections.Products]:
    """Chooses what is timed here: ``kernels`` with a CUDA device, else ``reference``, with the products of that path.

    Raises:
        RecipeError: If there is a GPU that the kernels cannot run on; the message says why.
    """
    if not torch.cuda.is_available():
        from mobiq_lightning.latency.reference_products import ReferenceProducts

        return "reference", ReferenceProducts(torch.device("cpu"))
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := missing_for_kernels(device, torch.bfloat16):
        raise RecipeError(
            f"latency: the kernels cannot run: {reason}. CUDA_VISIBLE_DEVICES= times the reference on the CPU"
        )
    from mobiq_lightning.latency.kernel_products import KernelProducts

    return "kernels", KernelProducts(device)


def chosen_sections(names: str, path: str) -> list[str]:
    """Names of the sections that a command line asks for, in the order in which they run.

    Args:
        names: Names separated by commas; empty for all that the path has.
        path: ``kernels`` or ``reference``.

    Raises:
        RecipeError: If a section does not exist, with the nearest name, or needs a CUDA device.
    """
    here = [s for s in SECTIONS if path == "kernels" or s not in CUDA_ONLY]
    check_names("", "", names)
    wanted = split(names)
    for name in wanted:
        if name not in here:
            raise RecipeError(f"latency: --sections: {name} needs a CUDA device; here there are {', '.join(here)}")
    return [s for s in here if s in wanted or not wanted]


def chosen_shapes(run: str, shapes: str, path: str) -> list[Shape]:
    """Shapes of the products that a command line asks for.

    Args:
        run: Run folder or elastic checkpoint whose shapes are taken, or empty.
        shapes: Names of shapes, separated by commas; if both are empty, those of known models.
        path: ``kernels`` or ``reference``.

    Raises:
        RecipeError: If both a run and shapes are given, or a shape does not exist.
        KernelError: If the kernels are to be timed, but the run is in a code that they do not read.
    """
    check_names(run, shapes, "")
    if not run:
        return parse_shapes(shapes or DEFAULT_SHAPES[path])
    listed = shapes_of_checkpoint(run)
    if reason := missing_for_code(listed[0].code):
        if path == "kernels":
            raise KernelError(
                f"latency: {run}: {reason}. CUDA_VISIBLE_DEVICES= times the reference on the CPU, and the LatencyCheck "
                "callback times the run's own model on any device"
            )
        say(f"{run}: {reason}. The reference is timed, with random weights of these shapes in the nested code")
    return listed


def versions() -> dict[str, str]:
    """Machine, date and versions that a measurement was made with, those of Triton and CUDA among them."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {**environment(), "triton": triton, "cuda": str(torch.version.cuda)}


def _method(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    how = "one CUDA graph of many launches, replayed" if device.type == "cuda" else "a loop on the host"
    return {
        "how": f"{how}; median of repeats, spread is the distance of the quartiles as a share of it",
        "weights": f"random, rotated over {CACHES} times the last cache, or {MAX_COPIES} copies",
        "cache_bytes": cache_bytes(device),
        "dtype": str(dtype).removeprefix("torch."),
        "router": "not timed except in whole models",
        "bytes": "read of the weights by one call, scales and biases included; tokens and results are not counted",
    }


def _run_section(name: str, journal: Journal, products: sections.Products, shapes: Sequence[Shape]) -> None:
    if name == "check":
        from mobiq_lightning.latency.check import check_kernels

        journal.put("largest_relative_error", check_kernels(products.device, products.dtype))
    elif name == "ceilings":
        sections.ceilings(journal)
    elif name == "decode":
        sections.decode(journal, products, shapes)
    elif name == "batch":
        sections.batch(journal, products, shapes)
    elif name == "prefill":
        from mobiq_lightning.latency.kernel_products import KernelProducts
        from mobiq_lightning.latency.prefill import prefill

        assert isinstance(products, KernelProducts)  # `chosen_sections` has seen to it
        prefill(journal, products, shapes)
    else:
        products.forget()
        model(journal, products.dtype)
