"""What is measured beside a calibration: a small part of its work, which follows from sizes and counts of tokens alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mobiq_lightning.calibration.planning.sizes import ModelSizes
from mobiq_lightning.calibration.planning.work import calibration_work
from mobiq_lightning.runs import GainMethod

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration
    from mobiq_lightning.sources import TextWindows

SHARE = 0.1
"""The part of the calibration's work that layer gains, and thresholds, may take where the recipe does not say how."""
LITTLE = 1e11
"""Products and sums that nobody waits for: a few seconds on any machine. Either may take so many in any case."""
LEAST_TOKENS, LEAST_WINDOWS = 2048, 4
"""Tokens and windows on which thresholds are tuned in any case, as far as there are so many."""
_WAY_BACK = 8
"""Products and sums of squared gradients for each weight and token: on the way there, once more, and twice as many back."""
_OF_A_CODE = 40
"""Operations for each weight that is read at a depth."""


@dataclass(frozen=True)
class GainsPlan:
    """How layer gains are measured.

    Args:
        methods: By which methods; none if they are not.
        windows: On how many calibration windows, the first ones.
        why: Why, where the recipe does not say; empty where it does, and where nothing was left out.
    """

    methods: tuple[GainMethod, ...]
    windows: int
    why: str = ""


def plan_gains(
    module: ElasticCalibration,
    sizes: ModelSizes,
    text: TextWindows,
    windows: int,
    given: Sequence[GainMethod] | None,
    asked: GainMethod | None,
) -> GainsPlan:
    """Chooses methods and windows.

    Probes are taken where they cost at most `SHARE` of the calibration, else squared gradients, on fewer windows if these would
    cost more as well.

    Args:
        module: Has the stages of the calibration.
        sizes: Sizes of the model.
        text: Its calibration windows.
        windows: Windows at most.
        given: Methods that the recipe names; None if it names none.
        asked: The method that the router needs; None if it needs none.
    """
    windows = min(windows, text.n_windows)
    needed = [] if asked is None else [asked]
    if given is not None or not windows or asked == "probes":
        methods = list(dict.fromkeys([*(given or []), *needed])) if windows else []
        return GainsPlan(tuple(methods), windows)
    work = max(calibration_work(sizes, module, text), 1.0)
    allowed, tokens = max(SHARE * work, LITTLE), windows * text.seq_len
    probes = 2 * probe_passes(sizes) * _whole(sizes) * tokens
    if probes <= allowed:
        return GainsPlan(tuple(dict.fromkeys(["probes", *needed])), windows)
    codes = _OF_A_CODE * len(sizes.slice_bits) * sizes.sliced
    affordable = int((allowed - codes) // (_WAY_BACK * _whole(sizes) * text.seq_len))
    taken = windows if asked else max(1, min(windows, affordable))
    why = f"probes would take {_figure(probes / work)} of the calibration's work"
    if taken < windows:
        why += f", and {windows} windows {_figure((codes + _WAY_BACK * _whole(sizes) * tokens) / work)}"
    return GainsPlan(("gradients",), taken, why)


def threshold_windows(
    module: ElasticCalibration, sizes: ModelSizes, text: TextWindows, windows: int, passes: int
) -> int:
    """Calibration windows on which thresholds are tuned: as many as asked for, or what the calibration's work allows.

    Args:
        module: Has the stages of the calibration.
        sizes: Sizes of the model.
        text: Its calibration windows.
        windows: Windows at most.
        passes: Passes of each window through all blocks.
    """
    windows = min(windows, text.n_windows)
    allowed = max(SHARE * calibration_work(sizes, module, text), LITTLE)
    least = max(LEAST_WINDOWS, math.ceil(LEAST_TOKENS / text.seq_len))
    return min(windows, max(least, int(allowed // (2 * passes * sizes.sliced * text.seq_len))))


def probe_passes(sizes: ModelSizes) -> int:
    """Passes of each window through the model: one for each input and slice after the first, for each depth, and the full one."""
    return (sizes.n_inputs + 1) * (len(sizes.slice_bits) - 1) + 1


def gradient_steps(sizes: ModelSizes) -> int:
    """Steps of squared gradients, each as long as a pass of the windows through a block: one there and three back."""
    return 4 * sizes.n_blocks


def head_steps(sizes: ModelSizes) -> int:
    """Such steps that the embedding's other end takes, there and back."""
    return math.ceil(3 * sizes.vocabulary * sizes.width / sizes.sliced_of_block)


def _whole(sizes: ModelSizes) -> int:
    return sizes.sliced + sizes.vocabulary * sizes.width


def _figure(ratio: float) -> str:
    """A ratio in words: a share below one, else a multiple."""
    return f"{ratio:.0%}" if ratio < 1 else f"{ratio:.1f} times"
