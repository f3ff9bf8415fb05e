"""How gains spread over tokens, and how that is summed up."""

from __future__ import annotations

import json

import pytest
import torch

from mobiq_lightning.evaluation import TokenView, token_rows, token_summary
from mobiq_lightning.evaluation.gains_by_token import rank_correlation
from tests.conftest import Run


def test_rank_correlation_sees_any_rising_or_falling_relation_and_none_in_constants() -> None:
    x = torch.tensor([0.1, -3.0, 2.0, 0.5])
    assert rank_correlation(x, x**3) == pytest.approx(1.0)
    assert rank_correlation(x, -x.exp()) == pytest.approx(-1.0)
    assert rank_correlation(x, torch.ones(4)) == 0.0
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    tied = torch.tensor([0.0, 1.0, 1.0, 2.0])
    assert rank_correlation(tied, torch.arange(4.0)) == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5)


def views(scores: torch.Tensor) -> list[TokenView]:
    return [TokenView(torch.zeros(6), scores)]


def test_rows_tell_the_first_tokens_of_windows_and_what_the_router_ranks() -> None:
    gains = torch.tensor([[[5.0, 1.0, 2.0, 7.0, 3.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]])
    rows = token_rows(gains, views(torch.stack([gains[0, 0], -gains[0, 1]], dim=1)), seq_len=3)
    assert rows[0].first_token == 6.0
    assert rows[1].first_token == 1.5
    assert [row.router_rank for row in rows] == pytest.approx([1.0, -1.0])
    assert [row.norm_rank for row in rows] == [0.0, 0.0]
    assert rows[0].token_std == pytest.approx(float(gains[0, 0].std()))


def test_the_summary_parts_layers_from_tokens() -> None:
    tokens = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    layers_alone = torch.ones(2, 1, 6) * torch.tensor([1.0, 3.0])[:, None, None]
    tokens_alone = (2 + tokens).expand(2, 1, 6)
    scores = tokens[:, None]
    for gains, between_layers, between_tokens, shared in (
        (layers_alone, 0.5, 0.0, 0.0),
        (tokens_alone, 0.0, float(tokens.std()) / 2, 1.0),
        (torch.stack([tokens, -tokens]).unsqueeze(1) + 2, 0.0, float(tokens.std()) / 2, 0.0),
    ):
        rows = token_rows(gains, views(scores) * 2, seq_len=3)
        summary = token_summary(gains, rows, [4.0, 4.0])
        assert summary.between_layers == pytest.approx(between_layers)
        assert summary.between_tokens == pytest.approx(between_tokens)
        assert summary.shared == pytest.approx(shared)


def test_a_run_keeps_the_spread_over_tokens_with_its_layer_gains(finished: Run) -> None:
    run, _ = finished
    rows = json.loads((run / "layer_gains.json").read_text())["rows"]
    assert all(row["token_std"] > 0 and -1 <= row["router_rank"] <= 1 for row in rows)
    summary = json.loads((run / "results.json").read_text())["layer_gains"]["tokens"]
    assert set(summary) == {"between_layers", "between_tokens", "shared", "first_token", "norm_rank", "router_rank"}
    assert summary["between_tokens"] > 0
