"""A value that was made of a tensor, kept until somebody asks with another tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


_State = tuple[int | None, int | None, torch.device, bool, bool]


class _Entry(NamedTuple):
    """A value, the tensor it was made of, and the state that the tensor was in."""

    tensor: weakref.ref[Tensor]
    state: _State
    value: Any


class TensorMemo(Generic[T]):
    """Keeps the last value that was made of a tensor, for whoever asks with the same tensor again.

    The same tensor is the same object whose data was neither changed in place (its version counter stands where it
    stood) nor exchanged (its address and its device are what they were). The tensor is referred to weakly, and the
    value is given up with it, so that neither outlives its use. A value whose autograd graph has saved the tensor is
    the exception: it holds the tensor, and is given up at the next tensor or at `forget`.

    A value is kept for the mode that it was made in: one without gradients is not given where gradients are asked for, and
    one of inference mode is not given outside of it.

    Tensors made in inference mode do not count their changes. They are the same by identity and address, which suits
    activations, unless the memo is told to keep nothing of them.

    While a graph is compiled nothing is kept: the compiler finds common parts by itself and cannot hold references.
    Copies and pickles of a memo are empty.

    Args:
        trust_uncounted: Whether values of tensors that do not count their changes are kept.
    """

    def __init__(self, trust_uncounted: bool = True) -> None:
        self.trust_uncounted = trust_uncounted
        self._entry: _Entry | None = None

    def get(self, tensor: Tensor, make: Callable[[], T]) -> T:
        """The value of a tensor, which `make` gives unless it is kept from the last call and the tensor is the same."""
        if torch.compiler.is_compiling():
            return make()
        state, entry = _state_of(tensor), self._entry
        if entry is not None and entry.tensor() is tensor and entry.state == state:
            value: T = entry.value
            return value
        self._entry = None  # before the new value is made, or there would be memory for two
        made = make()
        self._keep(tensor, state, made)
        return made

    def keep(self, tensor: Tensor, value: T) -> None:
        """Keeps the value of a tensor, as it is now, in place of what was kept."""
        if not torch.compiler.is_compiling():
            self._keep(tensor, _state_of(tensor), value)

    def take(self, tensor: Tensor) -> T | None:
        """The value that is kept of a tensor, which is given up with that; None if there is none."""
        entry = self._entry
        if entry is None or entry.tensor() is not tensor or entry.state != _state_of(tensor):
            return None
        self._entry = None
        value: T = entry.value
        return value

    def forget(self) -> None:
        """Gives up what is kept. Call it when something else than the tensor, on which the value depends, changes."""
        self._entry = None

    def _keep(self, tensor: Tensor, state: _State, value: T) -> None:
        if state[0] is None and not self.trust_uncounted:
            self._entry = None
            return
        memo = weakref.ref(self)  # no circle: the entry would hold the memo, and the memo the entry

        def drop(gone: weakref.ref[Tensor]) -> None:
            kept = memo()
            if kept is not None and kept._entry is not None and kept._entry.tensor is gone:
                kept._entry = None

        self._entry = _Entry(weakref.ref(tensor, drop), state, value)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept, which is tied to a tensor of this process."""
        return {**self.__dict__, "_entry": None}


def _state_of(tensor: Tensor) -> _State:
    """What changes with the data: version (None if it is not counted), address (None if there is none) and device; and the
    modes: whether gradients are recorded, and whether inference mode is on."""
    version = None if tensor.is_inference() else tensor._version
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # wrappers, as transforms of functions use them, have no storage of their own
        address = None
    return version, address, tensor.device, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
