"""Who may look at the scores and gates of a routed input, and recorders of both."""

from __future__ import annotations

import torch
from torch import Tensor

from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.thresholds import prefix_scores


class Observer:
    """Is told what a routed input decides, whenever it decides anew; by default it ignores that.

    Linears that are given the same tensor share one decision. While a graph is compiled each of them decides by itself.
    """

    def on_scores(self, router: Router, x: Tensor, scores: Tensor) -> None:
        """Called when tokens were scored, before gates open.

        Args:
            router: Who scored them.
            x: (..., I) the tokens.
            scores: (N, S - 1) their scores under the prefix rule, with gradients if they have any; bounded
                (`Router.bounded`) where a router is trained at a threshold that is not its own.
        """

    def on_bits(self, bits: Tensor) -> None:
        """Called when gates are open.

        Args:
            bits: (...) code bits per weight that each token reads.
        """


class BitsRecorder(Observer):
    """Keeps the bits that tokens read, one tensor (...) per decision, with gradients if they have any."""

    def __init__(self) -> None:
        self.records: list[Tensor] = []

    def on_bits(self, bits: Tensor) -> None:
        """Appends the bits (...) to `records`."""
        self.records.append(bits)


class ScoreRecorder(Observer):
    """Keeps the scores that decide, one tensor (N, S - 1) under the prefix rule per decision, without gradients."""

    def __init__(self) -> None:
        self.records: list[Tensor] = []

    def on_scores(self, router: Router, x: Tensor, scores: Tensor) -> None:
        """Appends the scores (N, S - 1) to `records`."""
        self.records.append(scores.detach())


class LiveScoreRecorder(Observer):
    """Keeps scores with gradients for the router, even where nothing else has any: one tensor (N, S - 1) per decision.

    The tokens count as given: a score has no gradient for what earlier blocks made of them. The scores are not bounded.
    """

    def __init__(self) -> None:
        self.records: list[Tensor] = []

    def on_scores(self, router: Router, x: Tensor, scores: Tensor) -> None:
        """Scores the tokens once more, with gradients, and appends the result (N, S - 1) to `records`."""
        with torch.enable_grad():
            live = router.scores(x.detach())[..., : scores.shape[-1]]
            self.records.append(prefix_scores(live).flatten(0, -2))
