"""How deep the tokens of an input are read: one value, of one of three kinds.

`FullPrecision` reads the weights that were never sliced, `FixedSlices` the same slices for every token, `Routed` lets
the scores of a router decide token by token. A `Routed` reading says whose scores these are and which threshold they
must pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mobiq_lightning.strategies.base import Router


@dataclass(frozen=True)
class FullPrecision:
    """Linears multiply by their full-precision weight. Only linears that are being calibrated hold one."""


@dataclass(frozen=True)
class FixedSlices:
    """All tokens read the same slices.

    Args:
        n_slices: Number of slices, coarsest first: 1 to S.
    """

    n_slices: int


@dataclass(frozen=True)
class OwnThreshold:
    """Slices open above the threshold of the router, which the dial sets for a model that is served."""


@dataclass(frozen=True)
class MeetBudget:
    """Slices open above the quantile of the current scores at which the tokens at hand read `bits` on average.

    Args:
        bits: Average bits per weight.
        together: Whether the tokens at hand are those of all processes that train together, each on its part of a batch.
    """

    bits: float
    together: bool = False


@dataclass(frozen=True, eq=False)
class CommonThreshold:
    """Slices open above a threshold that is given, with the gradient that it has.

    Args:
        threshold: Scalar threshold, for bounded scores (`Router.bounded`) where routers are trained, else for scores.
        opened: (B, T, S - 1) bool, which gates are open, if that is decided already; the threshold then decides
            gradients alone.
    """

    threshold: Tensor
    opened: Tensor | None = None


Rule = OwnThreshold | MeetBudget | CommonThreshold
"""Which threshold the scores of a routed reading must pass."""


@dataclass(frozen=True)
class Routed:
    """A router scores every token, and a slice is read by the tokens whose score is above a threshold.

    Args:
        rule: Rule that gives the threshold.
        router: Router that scores the tokens; None for the router of the input itself. Another one does not become a
            part of the model.
    """

    rule: Rule = OwnThreshold()
    router: Router | None = None

    @property
    def is_plain(self) -> bool:
        """Whether tokens are read as in a served model: by the input's own router, at that router's threshold."""
        return self == _PLAIN


_PLAIN = Routed()

Reading = FullPrecision | FixedSlices | Routed
"""How the tokens of an input are read at present."""
