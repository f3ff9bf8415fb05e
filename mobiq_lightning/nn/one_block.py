"""Runs a model that is larger than its device: its blocks lie on the host, and each is on the device while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.nn.host_tensors import HostTensors
from mobiq_lightning.nn.sliced_linear import SlicedLinear
from mobiq_lightning.strategies.base import SliceScheme


class OneBlockAtATime:
    """Brings each decoder block of a model to a device right before it runs, and gives it the host's tensors again after it.

    What lies outside of the blocks (embedding, last norm, rotary tables, head) goes to the device for good. With a block come the
    slice schemes of its linears. Whatever is set between two calls, such as the thresholds of a dial, is set on the host and
    comes along with the next call; what a block counts while it runs, such as the bits that its inputs read, is dropped.

    Args:
        model: Causal language model whose tensors are on the host.
        blocks: Its decoder blocks.
        device: Where they run.
        came: Function that is given each block when its tensors have come to the device.
        goes: Function that is given each block before it has the host's tensors again.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        came: Callable[[nn.Module], None] | None = None,
        goes: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.device, self.came, self.goes = device, came, goes
        self._as_called = True
        self._there: tuple[nn.Module, HostTensors] | None = None
        self._move_outside(model, blocks)
        for block in blocks:
            block.register_forward_pre_hook(self._bring)
            block.register_forward_hook(self._release, always_call=True)

    def _move_outside(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        within = {module for block in blocks for module in block.modules()}
        with torch.inference_mode(False), torch.no_grad():
            for module in model.modules():
                if module not in within:
                    module._apply(lambda tensor: tensor.to(self.device), recurse=False)

    @contextmanager
    def held(self, block: nn.Module) -> Iterator[None]:
        """Context in which a block is on the device, however often it is called; no other may be called."""
        self._bring(block)
        try:
            with self.none():
                yield
        finally:
            self._release(block)

    @contextmanager
    def none(self) -> Iterator[None]:
        """Context in which calls bring no block: for passes that compute nothing in them."""
        before, self._as_called = self._as_called, False
        try:
            yield
        finally:
            self._as_called = before

    def _bring(self, block: nn.Module, *_: Any) -> None:
        if not self._as_called:
            return
        if self._there is not None:
            raise RuntimeError("a decoder block was called within another one, which cannot both be on the device")
        moved = nn.ModuleList([block, *_schemes(block)])
        self._there = block, HostTensors(moved)
        with torch.inference_mode(False), torch.no_grad():  # copies that anything may be done with
            moved._apply(
                partial(Tensor.to, device=self.device, copy=True)
            )  # `to` would copy nothing on the host itself
            if self.came is not None:
                self.came(block)

    def _release(self, block: nn.Module, *_: Any) -> None:
        if not self._as_called or self._there is None or self._there[0] is not block:
            return
        if self.goes is not None:
            self.goes(block)
        for scheme in _schemes(block):
            scheme.forget()  # what it keeps of a weight lies on the device
        self._there[1].put_back()
        self._there = None


def _schemes(block: nn.Module) -> list[SliceScheme]:
    """The slice schemes of the linears of a block, which are not registered there."""
    return [module.scheme for module in block.modules() if isinstance(module, SlicedLinear)]
