"""Who may look at the scores and gates of a routed input, and recorders of both."""

from __future__ import annotations

import torch
from torch import Tensor

from mobiq_lightning.strategies.base import Router
from mobiq_lightning.strategies.thresholds import prefix_scores


class Observer:
    """Base of objects that a routed input tells what it decides, whenever it decides anew; this one ignores it.

    Linears that are given the same tensor share one decision. While a graph is compiled each of them decides by itself.
    """

    def on_scores(self, router: Router, x: Tensor, scores: Tensor) -> None:
        """Receives the scores of tokens, before gates open.

        Args:
            router: Router that scored the tokens.
            x: (..., I) the tokens.
            scores: (N, S - 1) scores of the N tokens under the prefix rule, with gradients if they have any; bounded
                (`Router.bounded`) where a router is trained at a threshold that is not its own.
        """

    def on_bits(self, bits: Tensor) -> None:
        """Receives the bits that tokens read, after gates have opened.

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
    """Keeps the scores that decide gates, one tensor (N, S - 1) under the prefix rule per decision, no gradients."""

    def __init__(self) -> None:
        self.records: list[Tensor] = []

    def on_scores(self, router: Router, x: Tensor, scores: Tensor) -> None:
        """Appends the scores (N, S - 1) to `records`."""
        self.records.append(scores.detach())


class LiveScoreRecorder(Observer):
    """Keeps scores with gradients for the router, even where nothing else has any: one tensor (N, S - 1) per decision.

    The scores are not bounded, and have no gradient for the tokens, so that earlier blocks are not trained by them.
    """

    def __init__(self) -> None:
        self.records: list[Tensor] = []

    def on_scores(self, router: Router, x: Tensor, scores: Tensor) -> None:
        """Scores the tokens once more, with gradients, and appends the result (N, S - 1) to `records`."""
        with torch.enable_grad():
            live = router.scores(x.detach())[..., : scores.shape[-1]]
            self.records.append(prefix_scores(live).flatten(0, -2))
