"""The range of each group: from its smallest to its largest weight, with learned ends."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.packing import SCALE_DTYPE


def learned_range(weight: Tensor, low_clip: Tensor, high_clip: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Computes width and centre (O, G) of the groups' ranges, rounded to the stored dtype as they will be saved.

    Args:
        weight: (O, I) weight; the range follows it if a transform is learned that changes it.
        low_clip: (O, G) learned; the lower end is ``2 sigmoid(low_clip)`` half-widths below the centre.
        high_clip: (O, G) learned; the upper end is ``2 sigmoid(high_clip)`` half-widths above the centre.
        group_size: Columns per group.
    """
    return range_between(*extremes(weight.float(), group_size), low_clip, high_clip)


def range_between(low: Tensor, high: Tensor, low_clip: Tensor, high_clip: Tensor) -> tuple[Tensor, Tensor]:
    """Computes width and centre (O, G) of the groups' ranges, rounded to the stored dtype as they will be saved.

    Args:
        low: (O, G) float32 smallest weight of each group.
        high: (O, G) float32 largest weight.
        low_clip: (O, G) learned; the lower end is ``2 sigmoid(low_clip)`` half-widths below the centre.
        high_clip: (O, G) learned; the upper end is ``2 sigmoid(high_clip)`` half-widths above the centre.
    """
    centre, half_width = (low + high) / 2, (high - low) / 2
    low = centre - half_width * 2 * torch.sigmoid(low_clip)
    high = centre + half_width * 2 * torch.sigmoid(high_clip)
    # In a group of (almost) equal weights the rounding of the bias alone would leave the range; keep it inside.
    narrowest = torch.maximum(low.abs(), high.abs()) * 2 * torch.finfo(SCALE_DTYPE).eps
    scale = round_as_stored(torch.maximum(high - low, narrowest + 1e-30))
    return scale, round_as_stored((low + high) / 2)


def extremes(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, (O, G) each, of a weight (O, I)."""
    group_size = min(group_size, weight.shape[1])
    missing = -weight.shape[1] % group_size
    # A copy of the last column changes neither extreme of the short group that it fills up.
    groups = F.pad(weight.unsqueeze(0), (0, missing), mode="replicate").squeeze(0) if missing else weight
    groups = groups.unflatten(1, (-1, group_size))
    return groups.amin(-1), groups.amax(-1)


def round_as_stored(value: Tensor) -> Tensor:
    """Rounds `value`, of any shape, to the dtype that is stored, bfloat16, with the gradient of no rounding."""
    return value + (value.to(SCALE_DTYPE).float() - value).detach()
