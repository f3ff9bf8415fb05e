"""Modules that a module refers to without owning them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Borrowed(Generic[T]):
    """A module, or a collection of modules, that belongs elsewhere.

    `torch.nn.Module` registers every module that is assigned to one of its attributes: it moves, saves and lists it as
    its own. What is wrapped in this class stays its owner's: ``self._routed = Borrowed(routed)``, then
    ``self._routed.value``. Copies and pickles of the borrower refer to copies of what it borrows: to those of the owner if
    both are copied together.

    Args:
        value: Module or collection of modules that is borrowed.
    """

    value: T
