"""What a caller of `load` asks for that no file may decide: it reaches the quantizer beside config.json, not through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoadCall:
    """What a call of `load`, or the command that makes it, asks for.

    Args:
        check_hashes: Whether files and tensors are compared with hashes.json.
        trust_router: Dotted path of a router that is no part of this package and may be imported; None for none.
        folder: Folder that is loaded; None in plain `from_pretrained`.
    """

    check_hashes: bool = True
    trust_router: str | None = None
    folder: Path | None = None


_CURRENT: ContextVar[LoadCall | None] = ContextVar("load_call", default=None)


def current_call() -> LoadCall:
    """The call of `load` that is being answered; without one, as in plain `from_pretrained`, everything is checked."""
    return _CURRENT.get() or LoadCall()


@contextmanager
def answering(call: LoadCall) -> Iterator[None]:
    """Context in which a checkpoint is loaded for a call."""
    token = _CURRENT.set(call)
    try:
        yield
    finally:
        _CURRENT.reset(token)
