"""What some strategies can do beside their base class: codes that are trained, routers that look at weights or at gains.

A strategy has one of these abilities if it has its methods; nothing needs to be registered or switched on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from mobiq_lightning.runs import GainMethod
from mobiq_lightning.strategies.base import SliceScheme


class TrainableCodes(SliceScheme):
    """A slice scheme whose codes are trained, one slice at a time, all coarser slices being frozen.

    A stage that trains `codes` calls, for every weight: `start_slice` when it begins; after each step `bound_rounding` if
    `rounding` is among its bounds, and `bound_saturation` if the scheme has a `max_saturation`; and `freeze` once no later stage
    moves codes. A run that resumes calls `start_slice` again.

    Args:
        out_features: O, rows of the weight.
        in_features: I, columns of the weight.
        slice_bits: Bits of each slice, coarsest first.
    """

    max_saturation: float | None = None
    """Steps of the finest depth by which training may leave a weight outside of the cell of its code; None for any number."""

    @abstractmethod
    def code_parameters(self) -> list[nn.Parameter]:
        """Parameters that decide codes, each (O, I), or empty before the first slice starts; all others are ranges."""

    @abstractmethod
    def start_slice(self, weight: Tensor, n_bits: int) -> bool:
        """Begins to train the codes of the slice that reaches `n_bits`; all coarser codes are frozen as they are.

        Args:
            weight: (O, I) the full-precision weight.
            n_bits: A depth of the slices, in bits.

        Returns:
            Whether it begins now: False if the slice is in training already, or done, as after a resume.
        """

    @abstractmethod
    def freeze(self, weight: Tensor) -> None:
        """Ends the training of codes: those of all slices stay as they are, and only ranges can still be learned.

        Args:
            weight: (O, I) the full-precision weight.
        """

    def bound_saturation(self, weight: Tensor) -> None:
        """Moves codes in training back to where finer slices still reach the weight, if the scheme has such a bound.

        Args:
            weight: (O, I) the full-precision weight.
        """

    @abstractmethod
    def bound_rounding(self, weight: Tensor) -> None:
        """Moves codes in training back until they differ from the weight's own code by one step at most.

        Args:
            weight: (O, I) the full-precision weight.
        """


@runtime_checkable
class ObservesWeights(Protocol):
    """A router that is shown the weights and what the slices make of them, say to score tokens without training."""

    def observe_weights(self, weight: Tensor, prefixes: Tensor, slice_bits: Sequence[int]) -> None:
        """Shows the router the weights: called before every epoch of the input's block, and when the block is done.

        What the router keeps belongs into buffers, so that it is saved; it must be a function of the arguments, the
        seed and the place of the router alone.

        Args:
            weight: (O, I) the full-precision weights of all linears that read the input, as they act on it.
            prefixes: (S, O, I) the same weights read with 1, 2, ... S slices.
            slice_bits: Bits of each slice.
        """


@runtime_checkable
class ObservesGains(Protocol):
    """A router that is shown what the slices of its input gain the whole model."""

    gains_from: ClassVar[GainMethod]
    """How the gains that the router is shown are measured."""

    def observe_gains(self, gains: Tensor, slice_bits: Sequence[int], n_weights: int) -> None:
        """Shows the router the gains: called once, after calibration and before thresholds are tuned.

        What the router keeps belongs into buffers, so that it is saved.

        Args:
            gains: (S - 1,) nats per token that each slice after the first takes from the KL divergence to full precision.
            slice_bits: Bits of all S slices.
            n_weights: Number of weights that read the input.
        """
