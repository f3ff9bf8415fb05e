"""Static depths: which inputs of a model read which slices, given what each slice of each input is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mobiq_lightning.packing import depths_of

WINDOW = 0.005
"""Bits by which an allocation may miss its budget for the sake of worth, where one comes that near."""
_CELLS = 20_000
"""Steps of the budget axis at most; sizes without a large common divisor are rounded to them."""


def concave_rates(gains: Sequence[float], slice_bits: Sequence[int]) -> list[float]:
    """Computes the gain per bit of each slice after the first, such that it does not rise from slice to slice.

    A slice can be read only after all coarser ones. Where a fine slice gains more per bit than those before it, they are
    worth reading only together: they are pooled, and all get the gain per bit of the pool. These are the slopes of the
    upper concave hull over the depths (pool adjacent violators).

    Args:
        gains: Gains of slices 2 to S, in any unit.
        slice_bits: Bits of all S slices.

    Returns:
        S - 1 rates, gain per bit, not increasing.
    """
    pools: list[tuple[float, int, int]] = []  # gain, bits, slices
    for gain, bits in zip(gains, slice_bits[1:], strict=True):
        pool = (float(gain), bits, 1)
        while pools and pools[-1][0] / pools[-1][1] < pool[0] / pool[1]:
            last = pools.pop()
            pool = (last[0] + pool[0], last[1] + pool[1], last[2] + pool[2])
        pools.append(pool)
    return [gain / bits for gain, bits, count in pools for _ in range(count)]


def best_depths(
    worth: Tensor,
    sizes: Sequence[int],
    slice_bits: tuple[int, ...],
    target_bits: float,
    allowed: Tensor | None = None,
    window: float = WINDOW,
) -> list[int]:
    """Finds the static depths of greatest worth at a budget: a knapsack with one choice for each input, solved exactly.

    Worths of inputs add up. Budgets are met as nearly as whole inputs allow, or within `window`; among all allocations there
    the one of greatest worth is taken. Sizes are rounded only if their greatest common divisor is below 1 / `_CELLS` of the
    whole, and then by half of that.

    Args:
        worth: (inputs, S) worth of reading each input with 1, 2, ... S slices.
        sizes: Weights that each input feeds.
        slice_bits: Bits of each slice.
        target_bits: Average bits per weight over all inputs.
        allowed: (inputs, S) bool, which depths may be taken; by default all.
        window: Bits by which the budget may be missed for the sake of worth.

    Returns:
        For each input the number of slices after the base that it reads, 0 to S - 1.
    """
    extra = [depth - slice_bits[0] for depth in depths_of(slice_bits)]
    unit = max(math.gcd(*sizes), sum(sizes) * extra[-1] / _CELLS, 1)
    units = [round(size / unit) for size in sizes]
    n_cells = sum(units) * extra[-1] + 1
    best = torch.full((n_cells,), -torch.inf, dtype=torch.float64)
    best[0] = 0.0
    chosen = torch.zeros(len(sizes), n_cells, dtype=torch.int8)
    values = worth.double().cpu()
    for row, count in enumerate(units):
        before, best = best, torch.full_like(best, -torch.inf)
        for n_open, bits in enumerate(extra):
            if allowed is not None and not bool(allowed[row, n_open]):
                continue
            cost = count * bits
            moved = before[: n_cells - cost] + values[row, n_open]
            better = moved > best[cost:]
            best[cost:] = torch.where(better, moved, best[cost:])
            chosen[row, cost:][better] = n_open
    per_bit = max(sum(units), 1)
    wanted = min(max(float(target_bits) - slice_bits[0], 0.0), float(extra[-1])) * per_bit
    distance = (torch.arange(n_cells) - wanted).abs().masked_fill(best == -torch.inf, torch.inf)
    near = (distance <= max(float(distance.min()), window * per_bit)).nonzero().flatten().tolist()
    cell = max(near, key=lambda c: (float(best[c]), -float(distance[c])))
    found = [0] * len(sizes)
    for row in reversed(range(len(sizes))):
        found[row] = int(chosen[row, cell])
        cell -= units[row] * extra[found[row]]
    return found


def nested_depths(
    worth: Tensor,
    sizes: Sequence[int],
    slice_bits: tuple[int, ...],
    budgets: Sequence[float],
    allowed: Tensor | None = None,
    window: float = WINDOW,
) -> list[list[int]]:
    """Finds the static depths of greatest worth at several budgets, such that no input reads less at a higher one.

    The lowest budget is settled first, and each starts from the depths of the one below it.

    Args:
        worth: (inputs, S) worth of reading each input with 1, 2, ... S slices.
        sizes: Weights that each input feeds.
        slice_bits: Bits of each slice.
        budgets: Average bits per weight over all inputs, in any order.
        allowed: (inputs, S) bool, which depths may be taken; by default all.
        window: Bits by which a budget may be missed for the sake of worth.

    Returns:
        For each budget, in the order of `budgets`, the number of slices after the base that each input reads, 0 to S -
        1.
    """
    possible = torch.ones_like(worth, dtype=torch.bool) if allowed is None else allowed.clone()
    found: dict[float, list[int]] = {}
    for bits in sorted(set(budgets)):
        found[bits] = best_depths(worth, sizes, slice_bits, bits, possible, window)
        for row, n_open in enumerate(found[bits]):
            possible[row, :n_open] = False
    return [found[bits] for bits in budgets]


def level_scores(n_slices: int, device: torch.device) -> Tensor:
    """Scores 0, -1, -2, ... (S - 1,) with which slices open one after the other, the same for every token."""
    return -torch.arange(n_slices - 1.0, device=device)


def split_budget(slice_bits: tuple[int, ...], target_bits: float) -> tuple[int, float]:
    """Finds the two neighbouring depths that average to a budget, and the share of each.

    Args:
        slice_bits: Bits of each slice.
        target_bits: Average bits per weight, clamped to what the slices can give.

    Returns:
        The number of slices after the base that everyone reads, and the share in [0, 1) that reads one more.
    """
    depths = depths_of(slice_bits)
    target = min(max(target_bits, depths[0]), depths[-1])
    lower = max(i for i, depth in enumerate(depths) if depth <= target)
    return lower, 0.0 if lower + 1 == len(depths) else (target - depths[lower]) / slice_bits[lower + 1]
