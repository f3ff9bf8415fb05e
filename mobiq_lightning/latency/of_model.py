"""Times the linears of a loaded elastic model at each budget, on the path that the model runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mobiq_lightning.environment import processor_name
from mobiq_lightning.latency.journal import Candidate
from mobiq_lightning.latency.reference_products import plain_product
from mobiq_lightning.latency.shapes import Shape, groups_of
from mobiq_lightning.latency.timing import Clock, Timing, cache_bytes, copies_for, copy_bandwidth
from mobiq_lightning.nn import ElasticLinear
from mobiq_lightning.runtime import KernelInput

WHAT = {
    "kernels": "the Triton kernels, 1 token",
    "reference": "the reference path, 1 token; it says nothing of other devices",
}
_COPIED_BYTES = {"cuda": 2**29, "cpu": 2**26}


def neighbours(bits: float, depths: Sequence[int]) -> tuple[int, int, float]:
    """The depths next to a budget, and the share of tokens that must read the upper one for the mean to be the budget.

    Args:
        bits: Mean bits per weight, within the depths.
        depths: Depths in bits, ascending.

    Returns:
        The lower depth, the upper depth, and the share in [0, 1]; 0 if the budget is a depth itself.
    """
    lower = max((d for d in depths if d <= bits), default=depths[0])
    upper = min((d for d in depths if d >= bits), default=depths[-1])
    return lower, upper, 0.0 if upper == lower else (bits - lower) / (upper - lower)


def time_linears(model: Any, used: dict[float, float], clock: Clock) -> dict[str, Any]:
    """Times the distinct shapes of a model with one token, beside plain weights of the same shape and dtype.

    Each shape is timed at every depth next to a budget, rotating over the weights of the blocks that have it. At a
    budget a token is taken to read one of the two depths around it, so its time is the mean of the two times, weighted
    such that the mean depth is the bits used. The time of the model is the sum over all its inputs. The router is not
    timed.

    Args:
        model: A loaded elastic model.
        used: For each budget asked for, the bits per weight that the model used.
        clock: Clock of the model's device.

    Returns:
        A mapping with ``path``, ``reason``, ``what``, ``device``, ``plain``, ``copy_gb_per_s``, ``shapes`` with the
        figures of their depths, and ``budgets``.
    """
    path = "kernels" if model.path == "kernels" else "reference"
    cuda = clock.device.type == "cuda"
    copied = copy_bandwidth(clock, _COPIED_BYTES[clock.device.type])
    depths = model.dial.inputs[0].depths
    wanted = sorted({d for bits in used.values() for d in neighbours(bits, depths)[:2]})
    generator = torch.Generator(clock.device).manual_seed(0)
    shapes = []
    for shape, groups in groups_of(model, "model").items():
        x = torch.randn(1, shape.in_features, generator=generator, device=clock.device).to(model.dtype)
        some = groups[: copies_for(_lowest_bytes(shape, path, x), cache_bytes(clock.device))]
        plain = clock.time(plain_product(shape, x, generator, len(some)).calls)
        rows = []
        for depth in wanted:
            candidate = _candidate(shape, some, x, depth, path)
            rows.append(_row(candidate, clock.time(candidate.calls), plain, copied))
        shapes.append(
            {"shape": shape.part, "rows": shape.rows, "columns": shape.in_features, "inputs": len(groups),
             "rotated_over": len(some), "plain_us": plain.us, "depths": rows}
        )  # fmt: skip
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        "path": path,
        "reason": model.path,
        "what": WHAT[path],
        "device": torch.cuda.get_device_name(clock.device) if cuda else processor_name(),
        "plain": dtype,
        "copy_gb_per_s": copied / 1e9,
        "shapes": shapes,
        "budgets": [_budget(asked, bits, shapes, depths, copied) for asked, bits in used.items()],
    }


def _lowest_bytes(shape: Shape, path: str, x: Tensor) -> int:
    """Bytes that the cheapest product of a shape reads."""
    per_weight = shape.depths[0] / 8 if path == "kernels" else x.element_size()
    return max(1, int(shape.n_weights * per_weight))


def _candidate(shape: Shape, groups: Sequence[list[ElasticLinear]], x: Tensor, depth: int, path: str) -> Candidate:
    if path == "kernels":
        from mobiq_lightning.latency.kernel_products import elastic_product

        held = [linears[0].kernel for linears in groups]
        return elastic_product(x, [kernel.weights for kernel in held if isinstance(kernel, KernelInput)], [depth])
    bits = torch.full((1,), depth, device=x.device)
    calls: list[Callable[[], object]] = [partial(_reference, linears, x, bits) for linears in groups]
    products = 1 if x.device.type == "cpu" else len(shape.depths)  # elsewhere the reference multiplies at every depth
    return Candidate("elastic", depth, products * shape.n_weights * x.element_size(), calls)


def _reference(linears: Sequence[ElasticLinear], x: Tensor, bits: Tensor) -> None:
    """Multiplies as `ElasticLinear` does without router and kernels, by dequantized weights that are kept."""
    for linear in linears:
        linear.multiply(x, bits)


def _row(candidate: Candidate, timing: Timing, plain: Timing, copied: float) -> dict[str, Any]:
    rate = candidate.n_bytes / (timing.us * 1e-6)
    return {
        "bits": candidate.bits,
        "us": timing.us,
        "spread": timing.spread,
        "bytes": candidate.n_bytes,
        "gb_per_s": rate / 1e9,
        "of_copy": rate / copied,
        "times_plain": plain.us / timing.us,
    }


def _budget(
    asked: float, used: float, shapes: Sequence[dict[str, Any]], depths: Sequence[int], copied: float
) -> dict[str, Any]:
    """Figures of all linears of the model together, for one token at one budget."""
    lower, upper, share = neighbours(used, depths)
    us = read = plain = 0.0
    for shape in shapes:
        by_depth = {row["bits"]: row for row in shape["depths"]}
        us += shape["inputs"] * _mix(by_depth[lower]["us"], by_depth[upper]["us"], share)
        read += shape["inputs"] * _mix(by_depth[lower]["bytes"], by_depth[upper]["bytes"], share)
        plain += shape["inputs"] * shape["plain_us"]
    rate = read / (us * 1e-6)
    return {
        "target_bits": asked,
        "used_bits": used,
        "us": us,
        "gb_per_s": rate / 1e9,
        "of_copy": rate / copied,
        "times_plain": plain / us,
        "tokens_per_second": None,
    }


def _mix(lower: float, upper: float, share: float) -> float:
    return lower + (upper - lower) * share
