"""Metrics of the comparison: perplexity, KL divergence and used bits, summed in float64 and over all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities (N, V) in float32 of logits (N, V) in any dtype, for N tokens and a vocabulary of V."""
    return F.log_softmax(logits.float(), dim=-1)


class Perplexity(Metric):
    """Token perplexity, ``exp(mean negative log-likelihood)``, as in the papers of the field.

    torchmetrics' own takes the logarithm of a softmax in the dtype of the logits, which is off by percents in bfloat16.
    """

    full_state_update = False
    nll: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, log_probs: Tensor, labels: Tensor) -> None:
        """Adds the predictions of N tokens.

        Args:
            log_probs: (N, V) log-probabilities over the vocabulary, float32.
            labels: (N,) ids of the tokens that came.
        """
        self.nll -= log_probs.gather(1, labels[:, None]).double().sum()
        self.count += labels.numel()

    def compute(self) -> Tensor:
        """The perplexity of all tokens so far, a float64 scalar."""
        return (self.nll / self.count).exp()


class KLDivergence(Metric):
    """Metric of ``KL(full precision || model)`` between next-token distributions, in nats, mean over tokens."""

    full_state_update = False
    divergence: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("divergence", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, log_probs: Tensor, reference: Tensor, reference_probs: Tensor | None = None) -> None:
        """Adds the predictions of N tokens.

        Args:
            log_probs: (N, V) log-probabilities of the model.
            reference: (N, V) log-probabilities of the full-precision model.
            reference_probs: (N, V) probabilities of the full-precision model, if they are at hand.
        """
        probs = reference.exp() if reference_probs is None else reference_probs
        self.divergence += torch.sub(reference, log_probs).mul_(probs).sum(-1).double().sum()
        self.count += log_probs.shape[0]

    def compute(self) -> Tensor:
        """The mean divergence of all tokens so far in nats, a float64 scalar."""
        return self.divergence / self.count


class UsedBits(Metric):
    """Metric of the code bits read per weight: mean over tokens, and over inputs weighted by their number of weights.

    Args:
        sizes: Number of weights that read each input.
    """

    full_state_update = False
    bits: Tensor
    count: Tensor

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = torch.tensor(list(sizes), dtype=torch.float64)
        self.add_state("bits", torch.zeros(len(sizes), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, bits: Sequence[Tensor], mask: Tensor | None = None) -> None:
        """Adds the bits that a batch of tokens read.

        Args:
            bits: For each input, (...) code bits that each token read of its weights.
            mask: (...) bool, which tokens count; by default all.
        """
        keep = torch.ones_like(bits[0], dtype=torch.bool) if mask is None else mask.reshape(bits[0].shape)
        self.bits += torch.stack([values[keep].double().sum() for values in bits])
        self.count += keep.sum()

    def compute(self) -> Tensor:
        """The mean bits per weight over all tokens so far, a float64 scalar."""
        sizes = self.sizes.to(self.bits.device)
        return (self.per_input() * sizes).sum() / sizes.sum()

    def per_input(self) -> Tensor:
        """Mean bits (inputs,) that the tokens read of each input's weights, float64; of this process alone."""
        return self.bits / self.count

    def per_input_everywhere(self) -> list[float]:
        """Mean bits that the tokens of all processes read of each input's weights; every process must call this."""
        with self.sync_context():
            found: list[float] = self.per_input().tolist()
        return found
