"""Finds how the kernels divide their work best on a GPU, and writes the table that `kernels.tuning` reads."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mobiq_lightning.console import say
from mobiq_lightning.errors import KernelError, RecipeError
from mobiq_lightning.files import write_json
from mobiq_lightning.kernels import missing_for_kernels
from mobiq_lightning.kernels.tuning import TUNED_FOLDER, DecodeConfig, file_name, table_json
from mobiq_lightning.latency.check import check_kernels
from mobiq_lightning.latency.command import DEFAULT_SHAPES, chosen_shapes, versions
from mobiq_lightning.latency.kernel_products import KernelProducts, prepared_for
from mobiq_lightning.latency.prefill import dequantized_mixed, grouped_tokens
from mobiq_lightning.latency.shapes import Shape, widest
from mobiq_lightning.latency.timing import Clock

TOKENS = (8, 16, 32, 64)
"""Numbers of tokens that are tuned for, the columns of the tensor cores' products; 8 is timed with one token."""
DEPTHS = (2, 4)
WORTH_A_KEY = 0.02
"""A shape gets a configuration of its own if that is faster than the one for all shapes by more than this share."""
GROUPED_TOKENS = (128, 256, 512, 1024, 2048)
REPEATS, LAUNCHES = 5, 32


@dataclass
class Found:
    """What a search over configurations of the decode kernel has found so far.

    Args:
        us: Microseconds by number of tokens, shape and configuration.
        refused: By description of a configuration that does not run, its error.
        left_out: Descriptions of what was not tried for want of time.
    """

    us: dict[int, dict[Shape, dict[DecodeConfig, float]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def candidates(tokens: int) -> Iterator[DecodeConfig]:
    """Yields the configurations of the decode kernel that are worth a try for a number of tokens."""
    programs = (3, 4, 6, 8, 12) if tokens == 8 else (1, 2, 3, 4)
    for rows, tiles, stages, per_processor in itertools.product((128, 64), (1, 2), (3, 4), programs):
        yield DecodeConfig(rows, tiles, stages, per_processor)


def tune_here(run: str, shapes: str, folder: Path, minutes: float) -> None:
    """Tunes the kernels on this machine's GPU, writes the table, and prints where it is and how it is used.

    Args:
        run: Run folder or elastic checkpoint whose shapes are tuned for, or empty.
        shapes: Names of shapes, or empty for those of the known models.
        folder: Folder that the table is written to.
        minutes: Minutes after which nothing more is tried; what is left then is listed in the table.

    Raises:
        RecipeError: If there is no GPU that the kernels run on.
        KernelError: If the kernels are wrong on it, or none of the configurations runs.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if reason := missing_for_kernels(device, torch.bfloat16):
        raise RecipeError(f"latency: --tune: the kernels cannot be tuned here: {reason}")
    listed = (
        chosen_shapes(run, shapes, "kernels")
        if run or shapes
        else chosen_shapes("", DEFAULT_SHAPES["kernels"], "kernels")
    )
    products = KernelProducts(device)
    check_kernels(device, products.dtype)  # the fastest wrong kernel must not win
    name = torch.cuda.get_device_name(device)
    path = folder / f"{file_name(name)}.json"
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    deadline = time.monotonic() + 60 * minutes
    say(f"Tuning for {name}: {len(listed)} shapes, at most {minutes:g} minutes")
    clock = Clock(device, repeats=REPEATS)
    table = tuned_table(products, listed, clock, processors, deadline)
    write_json(path, table)
    print(
        f"{path}: written. It is used with {TUNED_FOLDER}={folder} in the environment; to ship it, copy it to "
        f"mobiq_lightning/kernels/tuned/{path.name} and open a pull request."
    )


def tuned_table(
    products: KernelProducts,
    shapes: Sequence[Shape],
    clock: Clock,
    processors: int,
    deadline: float,
    counts: Sequence[int] = TOKENS,
    many: Sequence[int] = GROUPED_TOKENS,
) -> dict[str, Any]:
    """Tries configurations of the kernels and returns the content of the table of tuned ones.

    Args:
        products: Source of random weights and tokens.
        shapes: Shapes that are tuned for.
        clock: Clock that times the calls.
        processors: Number of streaming multiprocessors of the GPU.
        deadline: Time after which nothing more is tried, in seconds of `time.monotonic`.
        counts: Numbers of tokens that are tuned for.
        many: Numbers of tokens at which the grouped product is compared with one that dequantizes the weights first.

    Raises:
        KernelError: If for some number of tokens no configuration was measured for all shapes.
    """
    found = Found()
    for shape in shapes:  # the outer loop: weights are made once per shape
        for count in counts:
            found.us.setdefault(count, {})[shape] = _try_all(products, shape, count, clock, processors, deadline, found)
    decode_configs: dict[str, DecodeConfig] = {}
    for count in counts:
        decode_configs |= choose(count, found.us[count])
    until, compared = grouped_until(products, widest(list(shapes)), clock, deadline, many)
    measured: dict[str, Any] = {"environment": versions(), "shapes": [shape.name for shape in shapes]}
    measured |= {"refused": found.refused, "left_out": found.left_out, "grouped_against_dequantized": compared}
    return table_json(decode_configs, until, measured)


def choose(tokens: int, us: dict[Shape, dict[DecodeConfig, float]]) -> dict[str, DecodeConfig]:
    """Chooses configurations for one number of tokens: the best over all shapes, and better ones for single shapes.

    Args:
        tokens: Number of tokens, with which the keys begin.
        us: Microseconds by shape and configuration.

    Returns:
        By key of the table (``"8"``, or ``"8:rows:columns"`` for one shape), the configuration.

    Raises:
        KernelError: If no configuration was measured for all shapes.
    """
    complete = [shape for shape in us if us[shape]]
    common = set.intersection(*(set(us[shape]) for shape in complete)) if complete else set()
    if not common:
        raise KernelError(f"no configuration was measured at {tokens} tokens; give more --minutes, or fewer --shapes")

    def mean(config: DecodeConfig) -> float:
        return sum(math.log(us[shape][config]) for shape in complete)

    best = min(sorted(common, key=str), key=mean)
    keys = {str(tokens): best}
    for shape in complete:
        own = min(us[shape], key=lambda config, tried=us[shape]: tried[config])  # type: ignore[misc]
        if us[shape][own] < us[shape][best] * (1 - WORTH_A_KEY):
            keys[f"{tokens}:{padded_rows(shape)}:{shape.in_features}"] = own
    return keys


def padded_rows(shape: Shape) -> int:
    """Number of rows that the kernels hold of a shape: those of each linear are padded to a multiple of 128."""
    return sum(-(-rows // 128) * 128 for rows in shape.out_features)


def grouped_until(
    products: KernelProducts, shape: Shape, clock: Clock, deadline: float, many: Iterable[int]
) -> tuple[int, list[dict[str, float]]]:
    """Finds up to how many tokens of mixed depths the grouped kernel is at least as fast as dequantizing weights first.

    Args:
        products: Source of random weights and tokens.
        shape: Shape that is timed.
        clock: Clock that times the calls.
        deadline: Time after which nothing more is timed, in seconds of `time.monotonic`.
        many: Numbers of tokens that are timed, ascending.

    Returns:
        The number of tokens, 64 if the grouped kernel never wins; and the measured microseconds.

    Raises:
        KernelError: If nothing could be measured before the deadline.
    """
    until = 64
    rows: list[dict[str, float]] = []
    for count in many:
        if time.monotonic() > deadline and rows:
            break
        x = products.tokens(shape, count)
        bits = [shape.depths[token % len(shape.depths)] for token in range(count)]
        row = {"tokens": float(count)}
        for make in (grouped_tokens, dequantized_mixed):
            candidate = make(x, products.weights(shape), bits)
            row[candidate.product] = clock.time(candidate.calls, candidate.launches).us
        rows.append(row)
        if row["grouped"] <= row["dequantized"]:
            until = count
    return until, rows


def _try_all(
    products: KernelProducts,
    shape: Shape,
    tokens: int,
    clock: Clock,
    processors: int,
    deadline: float,
    found: Found,
) -> dict[DecodeConfig, float]:
    """Microseconds of every candidate for a shape, the geometric mean over `DEPTHS`."""
    from mobiq_lightning.kernels.decode import decode

    us: dict[DecodeConfig, float] = {}
    count = 1 if tokens == 8 else tokens
    x, weights = products.tokens(shape, count), products.weights(shape)
    prepared = [prepared_for(x, weights[0], [depth] * count) for depth in DEPTHS if depth in shape.depths]
    for config in candidates(tokens):
        if time.monotonic() > deadline:
            found.left_out.append(f"{shape.name}, {tokens} tokens, from {config} on")
            break
        key = f"{tokens} tokens, {config.block_rows} rows, {config.tiles_per_iteration} tiles, {config.stages} stages"
        if key in found.refused:
            continue
        try:
            times = [
                clock.time([partial(decode, p, w, config, processors) for w in weights], LAUNCHES).us for p in prepared
            ]
        except Exception as error:  # more registers or shared memory than there are
            if "CUDA error" in str(error):
                raise
            found.refused[key] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        us[config] = math.prod(times) ** (1 / len(times))
    return us
