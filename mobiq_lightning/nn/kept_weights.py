"""Dequantized weights that are kept for the next product, within a limit of memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 2 * 2**30
"""Default limit in bytes for the kept weights of one model."""


def kept_limit(needed: int) -> int:
    """Bytes that kept weights may take where `needed` bytes would hold all: the usual limit if they fit it, else a quarter.

    Where they do not fit, most are made anew in every pass in any case, and long batches take longer to multiply.
    """
    return KEPT_BYTES if needed <= KEPT_BYTES else KEPT_BYTES // 4


class KeptWeights:
    """A cache of dequantized weights of a model, by linear and depth, within a limit of memory.

    A model asks for its weights in the same order again and again, so dropping the one that was asked for longest ago
    would drop each just before it is needed. Once the limit is reached, a new weight is kept only in place of one that
    nobody asked for during a whole pass through the model, as when the dial has moved on to another depth.

    Args:
        limit_bytes: Bytes that all kept weights may take together.
        requests_per_pass: Number of weights that one forward pass of the model asks for, at most.
    """

    def __init__(self, limit_bytes: int, requests_per_pass: int) -> None:
        self.limit_bytes, self.requests_per_pass = limit_bytes, requests_per_pass
        self.n_bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Tensor, int]] = OrderedDict()  # the one asked for longest ago first
        self._requests = 0

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Gives the weight of `key`; `make` is called if it is not kept, and the result is kept if there is room.

        It is an ordinary tensor also if it is made in inference mode, since gradients may be asked of a later product.
        """
        self._requests += 1
        if key in self._kept:
            weight = self._kept[key][0]
        else:
            weight = make() if torch.compiler.is_compiling() else _ordinary(make)
            if not self._make_room(weight.nbytes):
                return weight
            self.n_bytes += weight.nbytes
        self._kept[key] = (weight, self._requests)
        self._kept.move_to_end(key)
        return weight

    def clear(self) -> None:
        """Drops all kept weights."""
        self._kept.clear()
        self.n_bytes = 0

    def _make_room(self, n_bytes: int) -> bool:
        while self.n_bytes + n_bytes > self.limit_bytes:
            if not self._kept:
                return False
            key, (weight, last) = next(iter(self._kept.items()))
            if self._requests - last <= self.requests_per_pass:
                return False
            del self._kept[key]
            self.n_bytes -= weight.nbytes
        return True

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, without the kept weights, which can be made anew."""
        return {**self.__dict__, "_kept": OrderedDict(), "n_bytes": 0}


def _ordinary(make: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # in this order: leaving inference mode turns gradients on
        return make()
