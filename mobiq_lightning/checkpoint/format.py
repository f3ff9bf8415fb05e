"""Defines the elastic checkpoint's format: every key of ``quantization_config`` in config.json, and its allowed values.

Whoever writes or reads these keys does so through `ElasticFormat`. Names of the tensors are in `packing.tensor_names`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeGuard, get_args

from mobiq_lightning.errors import CheckpointError, nearest
from mobiq_lightning.nn import BlockLayout, Share
from mobiq_lightning.packing import CODES, PackedSlices, depths_of
from mobiq_lightning.strategies.thresholds import Scope

QUANT_METHOD = "mobiq"
"""Name of elastic checkpoints in config.json, by which transformers finds their quantizer."""
FORMAT_VERSION = 3
"""The newest version of the format that this package reads."""
_REQUIRED = ("slice_bits", "group_size", "router", "layout")
_KEY = "config.json: quantization_config"


FORMER_STEP = 0.25
"""Distance in bits between the budgets of the threshold tables before it was a key."""


def needed_version(code: str, stored: Sequence[str], budget_step: float = FORMER_STEP) -> int:
    """The lowest version of the format that can describe a checkpoint, so that older packages read what they can.

    Args:
        code: Name of the code of its weights.
        stored: Names of the tensors that are stored for each transformed input.
        budget_step: Distance in bits between the budgets of the threshold tables.

    Returns:
        1 for the nested code and inputs that are read as they are; 2 for other codes, and for transformed inputs; 3 for tables
        with budgets that are not a quarter of a bit apart.
    """
    if budget_step != FORMER_STEP:
        return 3
    return 1 if code == PackedSlices.code and not stored else 2


@dataclass(kw_only=True)
class ElasticFormat:
    """What ``quantization_config`` of config.json says of an elastic checkpoint, in the order in which it is written.

    Args:
        quant_method: Always ``mobiq``.
        format_version: Version of the format, 1 to 3; by default the lowest that can describe the checkpoint.
        slice_bits: Bits of each slice, coarsest first; at most 8 in all.
        group_size: Columns of a weight that share scale and bias; 65536 or more for whole rows.
        router: ``{"class_path", "init_args"}`` of the routers.
        transform: ``{"class_path", "init_args", "stored"}`` of what was done to weights and inputs before slicing; `stored`
            names the tensors that the checkpoint holds of each input for it. None if nothing was noted, as before transforms
            existed.
        layout: Arguments of `BlockLayout`: place of the decoder blocks, and groups of linears that read the same input.
        share_routers: ``input`` if linears that read the same input share a router, ``linear`` if each has its own.
        threshold_scope: Threshold table that the dial uses unless another is asked for, ``layer`` or ``global``.
        default_bits: Bits per weight at which the dial stands after loading.
        max_bits: The depth in bits up to which planes are held; None for all.
        budget_step: Distance in bits between the budgets of the threshold tables. It is not written where it is a quarter of
            a bit, which versions 1 and 2 take for granted.
        code: Name of the code, by which stored bits become weights, one of `CODES`. It is not written for the nested
            code, which version 1 takes for granted.
    """

    quant_method: str = QUANT_METHOD
    format_version: int | None = None
    slice_bits: list[int]
    group_size: int
    router: dict[str, Any]
    transform: dict[str, Any] | None = None
    layout: dict[str, Any]
    share_routers: Share = "input"
    threshold_scope: Scope = "layer"
    default_bits: float = 4.0
    max_bits: int | None = None
    budget_step: float = FORMER_STEP
    code: str = PackedSlices.code

    def __post_init__(self) -> None:
        if self.format_version is None:
            self.format_version = needed_version(self.code, self.stored, self.budget_step)

    @property
    def stored(self) -> list[str]:
        """Names of the tensors that are stored for each transformed input; empty if inputs are read as they are."""
        return list((self.transform or {}).get("stored", []))

    @property
    def n_planes(self) -> int:
        """Number of bit planes that are held of every weight."""
        return self.max_bits or sum(self.slice_bits)

    def to_json(self) -> dict[str, Any]:
        """The keys and values of ``quantization_config`` as config.json has them."""
        found = {field.name: getattr(self, field.name) for field in fields(ElasticFormat)}
        if self.code == PackedSlices.code:
            del found["code"]
        if self.budget_step == FORMER_STEP:
            del found["budget_step"]
        return found

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Reads the format from ``quantization_config`` of config.json.

        Raises:
            CheckpointError: If it is not that of an elastic checkpoint, is of a newer version, lacks a key, has an
                unknown key, or has a value that is not allowed; the message names the key and what was expected.
        """
        check_json(stored, [field.name for field in fields(cls)])
        return cls(**stored)


def is_elastic(stored: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether the ``quantization_config`` of a config.json, None if absent, is that of an elastic checkpoint."""
    return isinstance(stored, Mapping) and stored.get("quant_method") == QUANT_METHOD


def check_json(stored: Mapping[str, Any], known: Iterable[str]) -> None:
    """Checks that ``quantization_config`` of config.json can be read by this version of the package.

    Args:
        stored: The keys and values as config.json has them.
        known: The keys that the format has.

    Raises:
        CheckpointError: If it cannot; the message names the key, what was expected, what was found and, for an unknown
            key, the nearest known one.
    """
    version = stored.get("format_version", 1)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:  # first: a newer version may have other keys
        raise CheckpointError(
            f"this elastic checkpoint has format version {version}; this version of mobiq-lightning reads up to "
            f"{FORMAT_VERSION}. Update mobiq-lightning"
        )
    _refuse_unknown(_KEY, stored, known)
    if missing := [key for key in _REQUIRED if key not in stored]:
        raise CheckpointError(f"{_KEY} lacks {', '.join(missing)}; the file is damaged or no elastic checkpoint's")
    code = stored.get("code", PackedSlices.code)
    if not isinstance(code, str) or code not in CODES:
        raise CheckpointError(f"config.json: there is no code {code!r}; there are {', '.join(CODES)}")
    for key, (fits, expected) in _VALUES.items():
        if key in stored and not fits(stored[key]):
            raise CheckpointError(
                f"{_KEY}.{key} should be {expected}, and is {stored[key]!r}. Restore config.json from where the "
                "checkpoint was made"
            )
    depths, held = depths_of(tuple(stored["slice_bits"])), stored.get("max_bits")
    if held is not None and held not in depths:
        raise CheckpointError(f"{_KEY}.max_bits should be null or one of the depths {list(depths)}, and is {held}")
    if not depths[0] <= (bits := stored.get("default_bits", depths[0])) <= depths[-1]:
        raise CheckpointError(f"{_KEY}.default_bits should lie from {depths[0]} to {depths[-1]} bits, and is {bits}")
    for key, parts in _PARTS.items():
        _refuse_unknown(f"{_KEY}.{key}", stored.get(key) or {}, parts)


def _refuse_unknown(place: str, found: Mapping[str, Any], known: Iterable[str]) -> None:
    known = list(known)
    if unknown := next((key for key in found if key not in known), None):
        hint = nearest(unknown, known) or f"The keys are {', '.join(known)}."
        raise CheckpointError(
            f"{place} has an unknown key {unknown!r}. {hint} Correct config.json, or update mobiq-lightning if a newer "
            "version wrote it"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and _is_int(value) and value > 0


def _are_slice_bits(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_positive, value)) and 1 <= sum(value) <= 8


def _is_class(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("class_path"), str):
        return False
    arguments = value.get("init_args", {})
    return isinstance(arguments, dict) and all(name.isidentifier() for name in arguments)


def _is_transform(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not _is_class(value):
        return False
    stored = value.get("stored", [])
    return isinstance(stored, list) and all(map(_is_text, stored))


def _is_layout(value: object) -> bool:
    if not isinstance(value, dict) or not _is_path(value.get("blocks", "model.layers")):
        return False
    groups = value.get("shared_inputs", [])
    if not isinstance(value.get("experts", False), bool):
        return False
    return isinstance(groups, list) and all(isinstance(group, list) and all(map(_is_text, group)) for group in groups)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))


def _are_bits(value: object) -> bool:
    return (_is_int(value) or isinstance(value, float)) and 1 <= value <= 8  # type: ignore[operator]


def _is_step(value: object) -> bool:
    return (_is_int(value) or isinstance(value, float)) and 2**-8 <= value <= 8  # type: ignore[operator]


def _is_group_size(value: object) -> bool:
    return _is_positive(value) and value < 2**31  # type: ignore[operator]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _one_of(*allowed: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in allowed, " or ".join(map(repr, allowed))


_CLASS_PARTS = ("class_path", "init_args")
_PARTS = {
    "router": _CLASS_PARTS,
    "transform": (*_CLASS_PARTS, "stored"),
    "layout": tuple(field.name for field in fields(BlockLayout)),
}
"""Keys of the values that are mappings themselves."""
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "quant_method": _one_of(QUANT_METHOD),
    "slice_bits": (_are_slice_bits, "a list of positive integers that add up to at most 8"),
    "group_size": (_is_group_size, "a positive integer below 2^31"),
    "router": (_is_class, "a mapping with class_path, a string, and init_args, a mapping"),
    "transform": (_is_transform, "null, or a mapping with class_path, init_args and stored, a list of names"),
    "layout": (
        _is_layout,
        "a mapping with blocks, a dotted path, shared_inputs, a list of lists of names, and experts, true or false",
    ),
    "share_routers": _one_of(*get_args(Share)),
    "threshold_scope": _one_of(*get_args(Scope)),
    "default_bits": (_are_bits, "a number of bits from 1 to 8"),
    "budget_step": (_is_step, "a number of bits from 1/256 to 8"),
    "max_bits": (lambda value: value is None or _is_positive(value), "null, or a positive integer"),
}
"""For each key, a function that says whether a value is allowed, and what is expected in words."""
