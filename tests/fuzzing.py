"""Valid content with something wrong in it, for tests that every reader refuses what is damaged with an error of its own.

All that is random comes from a `random.Random` that is given, so one seed always gives the same mutants.
"""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import yaml

from mobiq_lightning.errors import MobiqError

Content = TypeVar("Content")

CLEAN, ACCEPTED = "clean", "accepted"
"""How a reader may end: with an error of its own, or with what it has read."""


def nested(depth: int, kind: str = "list") -> Any:
    """Lists, or mappings, that lie `depth` deep in each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def odd_values() -> list[Any]:
    """Values that most places of most files must refuse: other types, other ranges, other sizes."""
    return [
        None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**70, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320,
        float("nan"), float("inf"), float("-inf"), "", "x", "nan", "1", "2.5", "\x00", "../..", "/etc/passwd", "a/b",
        "<script>alert(1)</script>", "ü\u202e\ud83d\ude00", "x" * 5000, "null", "[[[[", "{", "mobiq_lightning", "os.system",
        [], [[]], [None], [1, "a"], [float("nan")], list(range(200)), {}, {"a": 1}, {"": None}, {"class_path": "os.system"},
        {"class_path": 3, "init_args": []}, {"init_args": {"a": 1}}, nested(40), nested(70), nested(70, "map"),
    ]  # fmt: skip


def mutate(content: Content, random: Random) -> Content:
    """One mutant of a content: of bytes other bytes, of what JSON can hold something else that it mostly can.

    Args:
        content: Bytes; or a value of JSON, which is left as it is.
        random: Where all choices come from.
    """
    if isinstance(content, bytes):
        return _mutate_bytes(content, random)  # type: ignore[return-value]
    return _mutate_value(content, random)


def mutants(
    content: bytes, random: Random, count: int, parse: Callable[[str], Any], write: Callable[[Any], str]
) -> Iterator[bytes]:
    """Yields mutants of a text file as bytes: half of them of its structure, from 1 to 3 places at once, half of its bytes.

    Args:
        content: The file.
        random: Where all choices come from.
        count: How many.
        parse: Makes a value of the text, as `json.loads` does.
        write: Makes a text of a value, as `as_json` does.
    """
    value = parse(content.decode())
    for _ in range(count):
        if random.random() < 0.5:
            yield mutate(content, random)
            continue
        mutant = value
        for _ in range(random.choice((1, 1, 2, 3))):
            mutant = mutate(mutant, random)
        yield write(mutant).encode("utf-8", "surrogatepass")


def as_json(value: Any) -> str:
    """The value as JSON, NaN and infinity included, as Python reads it."""
    return json.dumps(value)


def as_yaml(value: Any) -> str:
    """The value as YAML."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120))


class _Dumper(yaml.SafeDumper):
    """Writes a value that stands in two places twice, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def outcome(read: Callable[[], object]) -> str:
    """How a reader ends: `CLEAN`, `ACCEPTED`, or the class and the place of any other exception.

    Args:
        read: Reads a file, or does what else could fail.
    """
    try:
        read()
    except MobiqError:
        return CLEAN
    except (Exception, SystemExit, RecursionError) as error:  # noqa: BLE001
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "mobiq_lightning" in f.filename] or frames
        return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {str(error)[:100]}"
    return ACCEPTED


def failures(read: Callable[[Content], object], inputs: Iterator[Content]) -> dict[str, Content]:
    """What a reader ended with, other than an error of its own or success, each with the first input that did it."""
    found: dict[str, Content] = {}
    for content in inputs:
        end = outcome(lambda content=content: read(content))  # type: ignore[misc]
        if end not in (CLEAN, ACCEPTED):
            found.setdefault(end, content)
    return found


def _mutate_bytes(content: bytes, random: Random) -> bytes:
    at, length = random.randrange(len(content) + 1), random.choice((1, 1, 2, 8, 64, 1000))
    other = random.randrange(len(content) + 1)
    changes: list[Callable[[], bytes]] = [
        lambda: _flipped(content, random),
        lambda: _flipped(content, random),
        lambda: content[:at],  # cut short, as after a full disk
        lambda: content[:at] + content[at + length :],
        lambda: content[:at] + random.randbytes(length) + content[at:],
        lambda: content[:at] + bytes(length) + content[at + length :],
        lambda: content[:at] + content[other : other + length] + content[at:],
        lambda: content[:at] + random.choice(_PIECES) + content[at:],
        lambda: content[:at] + random.choice(_PIECES) + content[at:],
        lambda: content + content,
        lambda: _other_number(content, random),
        lambda: _other_number(content, random),
        lambda: _without_line(content, random),
        lambda: random.choice(_WHOLE),
        lambda: _other_encoding(content, random),
    ]
    return random.choice(changes)()


_PIECES = [
    b"[" * 3000, b"{" * 3000, b'{"a":' * 3000, b"[" * 60, b"9" * 5000, b"1e999", b"-", b"\xff\xfe", b"\xef\xbb\xbf", b"\x00",
    b"NaN", b".nan", b"null", b'"', b"'", b"\n", b"\t", b": ", b"- ", b"&a [*a]", b"&a ", b"*a", b"!!python/name:os.system ",
    b"!!binary aGFsbG8=", b"!!set {a, b}", b"2020-01-01", b"2020-99-99", b"0x" + b"f" * 400, b"<<: ", b"? ", b"}", b"]", b",",
    b"#", b"%", b"---\n", b"\\u0000", b"\\ud800", b"true", b"{}", b"[]",
]  # fmt: skip
"""What is put into a text somewhere."""
_WHOLE = [
    b"", b"\n", b"null", b"3", b"[]", b"{}", b'"x"', b"[1, 2]", b"{", b"\x00" * 100, b"\xff\xfe[\x00]\x00", b"a: &a [*a]",
    b"[" * 100_000, b"9" * 5000, b"&a {b: *a}", b"NaN", b"---\n---\n", b"!!python/object/apply:os.system [true]",
]  # fmt: skip
"""Whole contents in place of another."""


def _flipped(content: bytes, random: Random) -> bytes:
    """Some bits turned round."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 3, 20)) if content else 0):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _other_number(content: bytes, random: Random) -> bytes:
    """One digit of the text as another number, small or huge."""
    places = [i for i, byte in enumerate(content[:100_000]) if 48 <= byte < 58]
    if not places:
        return content
    at = random.choice(places)
    number = random.choice(
        (b"-1", b"0", b"1e400", b"-", b"1e-400", str(2**70).encode(), b"9" * 5000, b"1.5", b"1_0", b"")
    )
    return content[:at] + number + content[at + 1 :]


def _without_line(content: bytes, random: Random) -> bytes:
    """One line gone, or there twice."""
    lines = content.splitlines(keepends=True) or [b""]
    at = random.randrange(len(lines))
    return b"".join([*lines[:at], *random.choice(([], [lines[at]] * 2)), *lines[at + 1 :]])


def _other_encoding(content: bytes, random: Random) -> bytes:
    encoding = random.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp500"))
    return content.decode("utf-8", "replace").encode(encoding, "replace")


def _mutate_value(value: Any, random: Random) -> Any:
    """The value with another one in one place, or with a part missing, doubled, renamed, wrapped or exchanged."""
    changed = copy.deepcopy(value)
    places = list(_places(changed))
    if not places or random.random() < 0.02:
        return random.choice(odd_values())
    parent, key = random.choice(places)
    here = parent[key]
    changes: list[Callable[[], object]] = [
        lambda: parent.__setitem__(key, random.choice(odd_values())),
        lambda: parent.__setitem__(key, random.choice(odd_values())),
        lambda: parent.__setitem__(key, _other_type(here, random)),
        lambda: parent.__setitem__(key, _other_type(here, random)),
        lambda: parent.__setitem__(key, _near(here, random)),
        lambda: parent.__setitem__(key, copy.deepcopy(_get(random.choice(places)))),  # what stands elsewhere
        lambda: parent.__delitem__(key),
        lambda: _doubled(parent, key, random),
        lambda: _renamed(parent, key, random),
    ]
    random.choice(changes)()
    return changed


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a value: the list or mapping, and its index or key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _get(place: tuple[Any, Any]) -> Any:
    return place[0][place[1]]


def _other_type(value: Any, random: Random) -> Any:
    """The same said in another type."""
    others: list[Any] = [[value], {"a": value}, str(value), repr(value)]
    others += [[*value, *value], dict(enumerate(map(str, value))), value[:1]] if isinstance(value, list) else []
    others += [list(value), list(value.values())] if isinstance(value, dict) else []
    others += [value + 0.5 if abs(value) < 2**60 else -value, bool(value)] if isinstance(value, (int, float)) else []
    return random.choice(others)


def _near(value: Any, random: Random) -> Any:
    """A value of the same type that is a little or far away."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return random.choice([-value, value + 1, value - 1, value * 2, value * 1000, value * 10**15, 0])
    if isinstance(value, str):
        at = random.randrange(len(value) + 1)
        return random.choice(
            [value[:at], value + "x", value.upper(), value[:at] + "/" + value[at:], value + "\n", " " + value]
        )
    return random.sample(value, len(value)) if isinstance(value, list) else value


def _doubled(parent: Any, key: Any, random: Random) -> None:
    if isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    else:
        parent[f"{key}{random.choice(('_', 's', '.x', ''))}"] = copy.deepcopy(parent[key])


def _renamed(parent: Any, key: Any, random: Random) -> None:
    if isinstance(parent, dict):
        parent[random.choice(("", "x", "class_path", "../x", f"{key} ", str(key)[:-1], str(key).upper()))] = parent.pop(
            key
        )
    else:
        parent.reverse()
