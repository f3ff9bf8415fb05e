"""Metrics of the comparison."""

from __future__ import annotations

import pytest
import torch

from mobiq_lightning.evaluation.metrics import KLDivergence, Perplexity, UsedBits, log_probabilities


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    metric = Perplexity()
    metric.update(log_probabilities(torch.zeros(10, 50)), torch.arange(10))
    assert float(metric.compute()) == pytest.approx(50.0, rel=1e-6)


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens_not_over_batches() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(30, 20), torch.randint(0, 20, (30,))
    metric = Perplexity()
    metric.update(log_probabilities(logits[:3]), labels[:3])
    metric.update(log_probabilities(logits[3:]), labels[3:])
    expected = torch.nn.functional.cross_entropy(logits.double(), labels).exp()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-6)


def test_half_precision_logits_lose_only_their_own_rounding() -> None:
    torch.manual_seed(0)
    logits, labels = (5 * torch.randn(200, 100)).bfloat16(), torch.randint(0, 100, (200,))
    metric = Perplexity()
    metric.update(log_probabilities(logits), labels)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels).exp()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-5)


def test_kl_divergence_is_that_of_torch_and_zero_for_equal_models() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(40, 30), torch.randn(40, 30)
    p, q = log_probabilities(theirs), log_probabilities(ours)
    metric = KLDivergence()
    metric.update(q, p)
    expected = torch.nn.functional.kl_div(q.double(), p.double(), log_target=True, reduction="batchmean")
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-5)
    equal = KLDivergence()
    equal.update(p, p)
    assert float(equal.compute()) == 0.0


def test_used_bits_weigh_inputs_by_their_weights_and_leave_out_padding() -> None:
    metric = UsedBits([300, 100])
    mask = torch.tensor([[True, True], [True, False]])
    metric.update([torch.full((2, 2), 2.0), torch.tensor([[8.0, 8.0], [2.0, 8.0]])], mask)
    assert metric.per_input().tolist() == [2.0, 6.0]
    assert float(metric.compute()) == pytest.approx((300 * 2 + 100 * 6) / 400)
