"""Measures what there is for a router to gain: how the gain of a slice spreads over tokens, and what could predict it.

Layer gains say what a slice of an input is worth on average. A router is worth its bits only as far as that differs between
tokens, and as far as it can be told from the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mobiq_lightning.nn import CalibratedBlock, RoutedInput, fixed_depth
from mobiq_lightning.runs import TokenGains, TokenSpread
from mobiq_lightning.strategies.routers.features import root_mean_square
from mobiq_lightning.strategies.thresholds import prefix_scores


@dataclass
class TokenView:
    """What a router can see of the T tokens of one input.

    Args:
        log_norm: (T,) logarithm of the root mean square of each token.
        scores: (T, S - 1) scores of the input's router, under the prefix rule.
    """

    log_norm: Tensor
    scores: Tensor


@torch.no_grad()
def token_views(
    model: Any, blocks: Sequence[CalibratedBlock], input_ids: Tensor, reference_bits: int, batch_size: int
) -> list[TokenView]:
    """Records what the router of each input sees of the tokens of windows while all weights are read at one depth.

    Args:
        model: The model with sliced linears.
        blocks: Calibrated blocks of the model, in order.
        input_ids: (N, T) windows.
        reference_bits: The depth in bits that all weights are read at.
        batch_size: Windows per forward pass.

    Returns:
        One view for each input, in order, of the N * T tokens of the windows one after the other.
    """
    readers = [pair for block in blocks for pair in zip(block.routed_inputs(), block.entries, strict=True)]
    seen: list[list[TokenView]] = [[] for _ in readers]

    def look(row: int, routed: RoutedInput) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            scores = prefix_scores(routed.router.scores(x)).flatten(0, -2)
            seen[row].append(TokenView(root_mean_square(x.float()).log().flatten().cpu(), scores.float().cpu()))

        return hook

    hooks = [entry.register_forward_pre_hook(look(row, routed)) for row, (routed, entry) in enumerate(readers)]
    try:
        with fixed_depth([routed for routed, _ in readers], reference_bits):
            for ids in input_ids.split(batch_size):
                model(input_ids=ids, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return [TokenView(torch.cat([v.log_norm for v in views]), torch.cat([v.scores for v in views])) for views in seen]


def token_rows(gains: Tensor, views: Sequence[TokenView], seq_len: int) -> list[TokenSpread]:
    """Figures of how the gains of each input and slice spread over tokens.

    Args:
        gains: (I, S - 1, T) gains in nats of I inputs and S - 1 slices at T tokens, windows one after the other.
        views: One view for each input, of what its router sees of the tokens.
        seq_len: Tokens per window.

    Returns:
        One row for each input and slice after the first, in order.
    """
    first = torch.arange(gains.shape[-1]) % seq_len == 0
    return [
        TokenSpread(
            token_std=float(saved.std()),
            first_token=float(saved[first].mean()),
            norm_rank=rank_correlation(saved, view.log_norm),
            router_rank=rank_correlation(saved, view.scores[:, number]),
        )
        for of_input, view in zip(gains.double(), views, strict=True)
        for number, saved in enumerate(of_input)
    ]


def token_summary(gains: Tensor, rows: Sequence[TokenSpread], sizes: Sequence[float]) -> TokenGains:
    """Sums up over the model how much the gain per bit varies between layers, and how much between tokens.

    Args:
        gains: (I, S - 1, T) gains in nats of I inputs and S - 1 slices at T tokens.
        rows: Rows of `token_rows` for these gains.
        sizes: Bits times weights of each input and slice, in the order of the rows.
    """
    flat, weights = gains.double().flatten(0, 1), torch.tensor(list(sizes), dtype=torch.float64)
    per_bit, share = flat / weights[:, None], weights / weights.sum()
    means, spreads = per_bit.mean(1), per_bit.var(1)
    overall = float((share * means).sum())
    within = float((share * spreads).sum())
    importance = share * spreads / max(within, 1e-300)
    relative = 1 / abs(overall) if overall else 0.0
    first = torch.tensor([row.first_token for row in rows], dtype=torch.float64)
    norm_ranks = torch.tensor([row.norm_rank for row in rows], dtype=torch.float64)
    router_ranks = torch.tensor([row.router_rank for row in rows], dtype=torch.float64)
    return TokenGains(
        between_layers=float((share * (means - overall).square()).sum().sqrt()) * relative,
        between_tokens=within**0.5 * relative,
        shared=float((share[:, None] * per_bit).sum(0).var()) / within if within else 0.0,
        first_token=float((share * first / weights).sum()) / overall if overall else 0.0,
        norm_rank=float((importance * norm_ranks).sum()),
        router_rank=float((importance * router_ranks).sum()),
    )


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two tensors (T,), in [-1, 1]; 0 if one of them is constant."""
    ranks = [_ranks(values.double()) for values in (one, other)]
    ranks = [rank - rank.mean() for rank in ranks]
    product = float(ranks[0].norm() * ranks[1].norm())
    return float(ranks[0] @ ranks[1]) / product if product else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks (T,) as floats; values that are equal share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    middles: Tensor = counts.cumsum(0).double() - (counts.double() - 1) / 2
    return middles[inverse]
