"""Records that are kept as JSON: read with an error that says what is wrong where, written with keys in a fixed order."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from mobiq_lightning.errors import FileError, ResultsError
from mobiq_lightning.input_files import read_json as read_file

if TYPE_CHECKING:
    from typing_extensions import Self

_ADVICE = "The file is damaged or from another version: restore it, or remove it and repeat the command that wrote it"
_ANY = (-math.inf, math.inf, False)
_LARGEST = 2**63
"""Whole numbers beyond this are no figures of anything."""
_NAMES = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", type(None): "null"}


def at_least(low: float, high: float = math.inf, finite: bool = True) -> dict[str, Any]:
    """Metadata of a field whose numbers lie within limits.

    Args:
        low: The lowest.
        high: The highest.
        finite: Whether NaN and infinity are refused, which figures of a run that has failed may be.
    """
    return {"limits": (low, high, finite)}


@dataclass(frozen=True)
class Record:
    """Base of dataclasses that JSON files hold.

    A field is a key of the file; ``field(metadata={"key": "class"})`` names a key that Python cannot, and
    ``field(metadata={"flat": True})`` says that the keys of the field's own value lie beside those of the record.
    ``field(metadata=at_least(0))`` limits its numbers, and ``field(metadata={"holds": R})`` says that a mapping, which is
    kept as it is, must have what a record R has. A field without a default must be in the file. A field whose default is
    None may be missing, and is not written while it is None. Keys that no field has are passed over, since a newer version
    may have written them. Numbers are kept as they are written: a whole number stays one where a float is expected, so that
    reading and writing a file does not change it.
    """

    @classmethod
    def from_json(cls, value: Any, source: str | Path, key: str = "") -> Self:
        """Makes a record of what a JSON file holds.

        Args:
            value: What `json.loads` gives.
            source: The file that it comes from, for the error.
            key: The key under which it lies there; empty for the whole file.

        Raises:
            ResultsError: Naming the file, the key, what is expected there and what was found.
        """
        if not isinstance(value, dict):
            raise _unexpected(source, key, "a mapping", value)
        given: dict[str, Any] = {}
        for field, kind in _fields_of(cls):  # type: ignore[arg-type]  # a class is hashable
            name = _key_of(field)
            if field.metadata.get("flat"):
                part = _flat_part(kind, value, source, key)
                given |= {field.name: part} if part is not None else {}
            elif name in value:
                if (form := field.metadata.get("holds")) and value[name] is not None:
                    form.from_json(value[name], source, _joined(key, name))
                limits = field.metadata.get("limits", _ANY)
                given[field.name] = _decoded(kind, value[name], source, _joined(key, name), limits)
            elif field.default is MISSING and field.default_factory is MISSING:
                raise ResultsError(
                    f"{source}: {_joined(key, name)} is missing; {_described(kind)} is expected there. {_ADVICE}"
                )
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """The record as `json.dumps` takes it, keys in the order of the fields."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            found |= _encoded(value) if field.metadata.get("flat") else {_key_of(field): _encoded(value)}
        return found


def read_json(path: Path) -> Any:
    """What a JSON file of figures holds.

    Raises:
        ResultsError: If there is no such file, or it is not JSON, as after a full disk.
    """
    try:
        return read_file(path)
    except FileError as error:
        advice = "" if isinstance(error.__cause__, FileNotFoundError) else f". {_ADVICE}"
        raise ResultsError(f"{error}{advice}") from error


@cache
def _fields_of(cls: type[Record]) -> tuple[tuple[Field[Any], Any], ...]:
    """Fields of a record with their types."""
    hints = get_type_hints(cls)
    return tuple((field, hints[field.name]) for field in fields(cls))


def _key_of(field: Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def _joined(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _flat_part(kind: Any, value: dict[str, Any], source: str | Path, key: str) -> Any:
    """The value of a field whose keys lie among others: a record, None if it has no key there; or a mapping of known names."""
    option = next(_options(kind))
    if get_origin(option) is Mapping:
        names, inner = get_args(option)
        known = [name for name in value if name in get_args(names)]
        return {name: _decoded(inner, value[name], source, _joined(key, name)) for name in known}
    keys = {_key_of(field) for field, _ in _fields_of(option)}
    return option.from_json(value, source, key) if keys & value.keys() else None


def _decoded(kind: Any, value: Any, source: str | Path, key: str, limits: tuple[float, float, bool] = _ANY) -> Any:
    """A value of a file as a value of a type; only the types that records have are known."""
    for option in _options(kind):
        if not _fits(option, value):
            continue
        if isinstance(option, type) and issubclass(option, Record):
            return option.from_json(value, source, key)
        if get_origin(option) is tuple:
            inner = get_args(option)[0]
            return tuple(_decoded(inner, item, source, f"{key}[{i}]", limits) for i, item in enumerate(value))
        if get_origin(option) is Mapping:
            names, inner = get_args(option)
            if broken := next((n for n in value if not _is_whole(n)), None):
                raise _unexpected(source, key, "a mapping of names without broken characters", broken)
            known = get_args(names) if get_origin(names) is Literal else value  # newer versions may know more
            return {n: _decoded(inner, v, source, _joined(key, n), limits) for n, v in value.items() if n in known}
        if option is str and not _is_whole(value):
            raise _unexpected(source, key, "a text without broken characters", value)
        if option in (int, float):
            _check_limits(value, source, key, limits)
        return value
    raise _unexpected(source, key, _described(kind), value)


def _is_whole(text: str) -> bool:
    """Whether a text can be written: JSON can say one half of a character that takes two."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _check_limits(value: float, source: str | Path, key: str, limits: tuple[float, float, bool]) -> None:
    low, high, finite = limits
    if isinstance(value, float) and not math.isfinite(value):
        if finite:
            raise _unexpected(source, key, "a finite number", value)
        inside = math.isnan(value) or value >= low
    else:
        inside = low <= value <= high and not (isinstance(value, int) and abs(value) > _LARGEST)
    if not inside:
        least = f" of at least {low:g}" if math.isfinite(low) else ""
        most = f"{' and' if least else ' of'} at most {high if math.isfinite(high) else float(_LARGEST):g}"
        raise _unexpected(source, key, f"a number{least}{most}", value)


def _options(kind: Any) -> Iterator[Any]:
    """The types of a union, or the type itself."""
    if get_origin(kind) in (Union, types.UnionType):
        for option in get_args(kind):
            yield from _options(option)
    else:
        yield kind


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value of a file looks like a type from outside."""
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list)
    if get_origin(kind) is Mapping or issubclass(kind, Record):
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


def _described(kind: Any) -> str:
    """A type in words."""
    return " or ".join(dict.fromkeys(_described_option(option) for option in _options(kind)))


def _described_option(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    return "a list" if get_origin(kind) is tuple else _NAMES.get(kind, "a mapping")


def _encoded(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, (list, tuple)):
        return [_encoded(item) for item in value]
    return {name: _encoded(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def _unexpected(source: str | Path, key: str, expected: str, found: Any) -> ResultsError:
    shown = json.dumps(found, default=str)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    where = f"{source}: {key}" if key else str(source)
    return ResultsError(f"{where} holds {shown}; {expected} is expected. {_ADVICE}")
