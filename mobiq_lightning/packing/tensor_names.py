"""Names of the tensors of an elastic checkpoint, made and read in one place.

A sliced linear ``L`` is stored as tensors of the module ``L``: its bit planes ``L.plane_0``, ``L.plane_1``, ..., the values
of its code (``L.slice_scale``, ``L.slice_bias``, ``L.slice_table_1``, ...) and ``L.bias`` if it adds one. The first of the
linears that read one input carries what belongs to the input: ``L.input.router.*``, ``L.input.transform.*`` and the
threshold tables ``L.input.budgets``, ``L.input.layer_thresholds`` and ``L.input.global_thresholds``. Every other tensor has
the name that the source model gives it.
"""

from __future__ import annotations

import re
from typing import Literal

TensorKind = Literal["plane", "scale", "bias", "table", "router", "transform", "thresholds", "budgets", "other"]
"""Kind of a stored tensor: a bit plane; a scale, bias or table of a code; part of a router or of a transformed input;
thresholds, or the budgets that they are for; anything that is not sliced."""

INPUT = "input"
"""Name of the routed input in the linear that carries it."""
ROUTER, TRANSFORM = "router", "transform"
"""Names of the router and of the transform in the routed input."""
BUDGETS, THRESHOLDS = "budgets", ("layer_thresholds", "global_thresholds")
"""Names of the tables of the routed input."""

_KINDS: tuple[tuple[TensorKind, str], ...] = (
    ("router", rf"\.{INPUT}\.{ROUTER}\..+"),
    ("transform", rf"\.{INPUT}\.{TRANSFORM}\..+"),
    ("thresholds", rf"\.{INPUT}\.({'|'.join(THRESHOLDS)})"),
    ("budgets", rf"\.{INPUT}\.{BUDGETS}"),
    ("plane", r"(^|\.)plane_(?P<plane>\d)"),
    ("scale", r"(^|\.)slice_scale(_(?P<plane>\d))?"),
    ("bias", r"(^|\.)slice_bias(_(?P<plane>\d))?"),
    ("table", r"(^|\.)slice_table_(?P<plane>\d)"),
)
"""Patterns of the end of a name, the first that matches counts: what a router calls its tensors is its own business."""
_PATTERNS = [(kind, re.compile(f"{pattern}$")) for kind, pattern in _KINDS]


def plane_name(plane: int) -> str:
    """Gives the name of bit plane `plane`, from 0, within its linear, such as ``plane_3``."""
    return f"plane_{plane}"


def value_name(kind: Literal["scale", "bias", "table"], plane: int | None = None) -> str:
    """Gives the name of a value of a code within its linear.

    Args:
        kind: Kind of the value.
        plane: Last plane that the value needs, from 0; None if it belongs to all depths.

    Returns:
        ``slice_scale``, or ``slice_scale_3`` for a scale that is of no use without plane 3.
    """
    return f"slice_{kind}" if plane is None else f"slice_{kind}_{plane}"


def input_tensor_name(linear: str, name: str) -> str:
    """Gives the name that a tensor of a routed input has in a checkpoint.

    Args:
        linear: Dotted path of the linear that carries the input.
        name: Name within the routed input, such as ``router.weight`` or ``budgets``.
    """
    return f"{linear}.{INPUT}.{name}"


def kind_of(name: str) -> TensorKind:
    """Tells the kind of the stored tensor `name`; ``other`` if it is not part of a sliced linear or of its input."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other")


def plane_of(name: str) -> int | None:
    """Last plane, from 0, that the stored tensor `name` needs to be of any use; None if it belongs to all depths."""
    found = next((match for _, pattern in _PATTERNS if (match := pattern.search(name))), None)
    plane = None if found is None else found.groupdict().get("plane")
    return None if plane is None else int(plane)


def carrier_of(name: str) -> str:
    """Dotted path of the linear that carries the input which the stored tensor `name` belongs to.

    Raises:
        ValueError: If the tensor belongs to no routed input.
    """
    linear, found, _ = name.partition(f".{INPUT}.")
    if not found:
        raise ValueError(f"{name} is no tensor of a routed input; their names are <linear>.{INPUT}.<name>")
    return linear


def deeper_than(n_planes: int) -> str:
    """Regular expression for names of planes and values that need more than the first `n_planes` (1 to 7) planes."""
    return rf"\.(plane|slice_(scale|bias|table))_[{n_planes}-7]$"
