"""Compares the tokens that suffer most at one precision with those that suffer most at another.

Letters in shapes: P precisions, N tokens.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from mobiq_lightning.errors import DataError, RecipeError


def check_precisions(bits: tuple[int, ...], depths: tuple[int, ...]) -> None:
    """Checks that at least two different precisions are given, and that the slices can be read at each.

    Args:
        bits: The precisions, in bits.
        depths: Depths in bits at which the slices can be read.

    Raises:
        RecipeError: If a precision is no depth, is given twice, or is the only one.
    """
    wrong = [b for b in bits if b not in depths]
    if wrong:
        raise RecipeError(
            f"outliers: bits {wrong} are no depths of the slices; depths are {list(depths)}. Give some of them, or other "
            "model.slices"
        )
    if len(bits) < 2 or len(set(bits)) < len(bits):
        raise RecipeError(
            f"outliers: bits {list(bits)}: precisions are compared with each other, so give at least two, each once; "
            f"depths are {list(depths)}"
        )


def check_share(share: float) -> None:
    """Checks that the part of the tokens that counts as worst lies between 0 and 1.

    Raises:
        RecipeError: If it does not.
    """
    if not 0 < share < 1:
        raise RecipeError(
            f"outliers: share ({share:g}) is the part of the tokens that counts as worst and must lie between 0 and 1, "
            "as 0.1 does"
        )


def count_worst(n_tokens: int, share: float) -> int:
    """Number of tokens that are the worst `share` of `n_tokens`, rounded.

    Raises:
        DataError: If that is none or all of them.
    """
    count = round(share * n_tokens)
    if not 0 < count < n_tokens:
        raise DataError(
            f"outliers: {share:g} of {n_tokens} measured tokens are {count} tokens, which cannot be compared; evaluate on "
            "more windows (data.eval_max_windows, or max_windows of OutlierMigration)"
        )
    return count


def worst_tokens(errors: Tensor, share: float) -> Tensor:
    """Marks the tokens with the largest errors at each precision; of equal errors the earlier token comes first.

    Args:
        errors: (P, N) errors of N tokens at P precisions.
        share: Part of the tokens that counts as worst, in (0, 1).

    Returns:
        (P, N) bool, true for the worst tokens.

    Raises:
        DataError: If the share is none or all of so many tokens.
    """
    order = errors.argsort(dim=1, descending=True, stable=True)[:, : count_worst(errors.shape[1], share)]
    return torch.zeros_like(errors, dtype=torch.bool).scatter_(1, order, True)


def overlaps(errors: Tensor, bits: tuple[int, ...], share: float) -> dict[str, float]:
    """Share of the worst tokens at one precision that are also among the worst at another; by chance it is `share`.

    Args:
        errors: (P, N) errors of N tokens at P precisions.
        bits: The P precisions.
        share: Part of the tokens that counts as worst, in (0, 1).

    Returns:
        By pair of precisions, such as ``"2-4"``, the share in [0, 1].

    Raises:
        DataError: If `share` is none or all of so many tokens.
    """
    worst = worst_tokens(errors, share).double()
    common = (worst @ worst.T) / worst[0].sum()
    return _by_pair(common, bits)


def rank_correlations(errors: Tensor, bits: tuple[int, ...]) -> dict[str, float]:
    """Spearman's rank correlation of the errors at two precisions, by pair such as ``"2-4"``.

    Args:
        errors: (P, N) errors of N tokens at P precisions.
        bits: The P precisions.

    Returns:
        By pair of precisions, the correlation in [-1, 1]; NaN where all errors of a precision are equal.
    """
    return _by_pair(torch.corrcoef(torch.stack([_ranks(row) for row in errors])), bits)


def _ranks(values: Tensor) -> Tensor:
    """Ranks (N,) float64 of values (N,), equal values sharing the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2)[place]
    return ranks


def _by_pair(matrix: Tensor, bits: tuple[int, ...]) -> dict[str, float]:
    pairs = combinations(range(len(bits)), 2)
    return {f"{bits[i]}-{bits[j]}": round(float(matrix[i, j]), 6) for i, j in pairs}
