"""What slices of inputs gain the whole model: layer_gains.json, and its summary in results.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mobiq_lightning.runs.record import Record

GainMethod = Literal["probes", "gradients"]
"""How it is measured what a slice gains: with forward passes in which one input reads another depth, or from gradients."""
UNIT = "nats per token"
"""Unit of all gains."""


def best_method(measured: Collection[GainMethod]) -> GainMethod | None:
    """The method whose gains choose the best layers of a comparison: probes where there are some; None if nothing is there."""
    methods: tuple[GainMethod, ...] = ("probes", "gradients")
    return next((method for method in methods if method in measured), None)


@dataclass(frozen=True)
class TokenSpread(Record):
    """How the gain of one slice of one input differs from token to token.

    Args:
        token_std: Standard deviation over tokens, nats.
        first_token: Mean gain of the first tokens of windows, nats.
        norm_rank: Rank correlation (Spearman, in [-1, 1]) of the gain with the norm of the token; 0 where all are alike.
        router_rank: Rank correlation of the gain with the score of the router.
    """

    token_std: float
    first_token: float
    norm_rank: float
    router_rank: float


@dataclass(frozen=True)
class LayerGainRow(Record):
    """What one slice of one input gains the whole model. In the file, `gains` and `tokens` lie flat beside the others.

    Args:
        input: Name of the input, that of the first linear that reads it.
        weights: Weights that read the input.
        slice: Number of the slice, from 2, as the first one is always read.
        bits: Bits of the slice.
        gains: Gain by each method that was used, nats per token.
        tokens: How the probed gain spreads over tokens; None if it was not probed.
    """

    input: str
    weights: int
    slice: int
    bits: int
    gains: Mapping[GainMethod, float] = field(metadata={"flat": True})
    tokens: TokenSpread | None = field(default=None, metadata={"flat": True})


@dataclass(frozen=True)
class LayerGainsFile(Record):
    """Content of layer_gains.json.

    Args:
        windows: Calibration windows that were measured on.
        seq_len: Tokens per window.
        reference_bits: Depth, in bits, that all other inputs read while one was probed; None if they read the depth that each
            slice reaches, or none was probed.
        unit: Unit of the gains.
        rows: A row for each input and each slice after the first, in the order of the model.
    """

    windows: int
    seq_len: int
    reference_bits: int | None = field(default=None, kw_only=True)
    unit: str
    rows: tuple[LayerGainRow, ...]


@dataclass(frozen=True)
class MethodGains(Record):
    """What one method says of all inputs together.

    Args:
        total: Sum of all gains, nats per token.
        most: Input whose second slice is worth most per bit and weight; None if there is but one slice.
        least: Input whose second slice is worth least per bit and weight.
    """

    total: float
    most: str | None = None
    least: str | None = None


@dataclass(frozen=True)
class TokenGains(Record):
    """Where the variance of what a bit saves lies: between layers, or between tokens.

    Args:
        between_layers: Standard deviation of the gain per bit over inputs and slices, relative to its mean.
        between_tokens: Standard deviation over tokens within an input and slice, relative to the mean.
        shared: Share of the variance between tokens that all inputs and slices have in common.
        first_token: Gain of the first token of a window relative to the mean.
        norm_rank: Mean rank correlation with the norm of the token, weighted by the variance between tokens.
        router_rank: Mean rank correlation with the score of the router, weighted in the same way.
    """

    between_layers: float
    between_tokens: float
    shared: float
    first_token: float
    norm_rank: float
    router_rank: float


@dataclass(frozen=True)
class GainsSummary(Record):
    """What results.json says of layer gains.

    Args:
        windows: Calibration windows that were measured on.
        seq_len: Tokens per window.
        reference_bits: Depth, in bits, that all other inputs read while one was probed; None if they read the depth that each
            slice reaches, or none was probed.
        seconds: Time that it took.
        methods: Figures by method.
        why: Why these methods and windows were taken; None where the recipe says, or nothing was left out.
        tokens: How gains spread over tokens; None if none was probed.
    """

    windows: int
    seq_len: int
    reference_bits: int | None = field(default=None, kw_only=True)
    seconds: float
    methods: Mapping[GainMethod, MethodGains]
    why: str | None = field(default=None, kw_only=True)
    tokens: TokenGains | None = None

    @property
    def sentence(self) -> str:
        """How the best layers of the comparison were chosen, in a sentence; empty if nothing was measured."""
        method = best_method(self.methods)
        if method is None:
            return ""
        how = {"probes": "probes of the whole model", "gradients": "squared gradients"}[method]
        return f"Best layers are chosen by {how} on {self.windows} windows{f': {self.why}' if self.why else ''}."
