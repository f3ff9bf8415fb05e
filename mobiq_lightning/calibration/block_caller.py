"""Calls the decoder blocks of a model one at a time.

Decoder blocks are called, never re-implemented: what the model passes to each of its blocks beside hidden states (masks,
rotary embeddings, flags) is caught once, in one pass through blocks that hand on what they are given, and passed on whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.calibration.caught_calls import CaughtCalls, catch_calls, pass_through
from mobiq_lightning.nn import HostTensors


class _CaughtInput(Exception):  # noqa: N818 - a signal, not an error
    """Ends the forward pass of the model once the input of its first block is known."""


class BlockCaller:
    """Calls the decoder blocks of a model one at a time, each with what the model itself would pass to it.

    Args:
        model: The causal language model.
        blocks: Its decoder blocks.
        device: Where blocks run. Only the block that runs is there; the others stay where they are.
        float32_blocks: Blocks that run in float32, whatever the dtype of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        float32_blocks: Collection[int] = (),
    ) -> None:
        self.model, self.blocks, self.device = model, blocks, device
        self.float32_blocks = float32_blocks
        self.dtype = next(model.parameters()).dtype
        self._caught: CaughtCalls | None = None
        self._moved: dict[tuple[int, torch.dtype], Tensor] = {}
        self._gives_tuple = False
        self._resident: tuple[int, bool] | None = None
        self._host: HostTensors | None = None

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """Inputs of the first block.

        What the other arguments of blocks are is caught too, with one row, so that their batch dimension of 1 fits any batch.

        Args:
            input_ids: (B, T); blocks are called with T tokens until `embed` is called with others.

        Returns:
            (B, T, H) on the device of the model's embedding.

        Raises:
            ModelError: If the blocks cannot be called one at a time, as what the model passes to one of them depends on more
                than the place of tokens.
        """
        found: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _CaughtInput

        ids = input_ids.to(self.model.get_input_embeddings().weight.device)  # type: ignore[operator]
        if self._caught is None or self._caught.n_tokens != ids.shape[1]:
            self._caught = catch_calls(self.model, self.blocks, ids[:1])
            self._moved = {}
        handle = self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.model(input_ids=ids, use_cache=False)
        except _CaughtInput:
            pass
        finally:
            handle.remove()
        return found[0]

    @torch.no_grad()
    def embed_all(self, input_ids: Tensor) -> Tensor:
        """Inputs (N, T, H) of the first block for windows (N, T), one window at a time."""
        return torch.cat([self.embed(window) for window in input_ids.split(1)])

    def call(self, index: int, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H): block `index` on the device.

        Raises:
            RuntimeError: If nothing was embedded yet, so that it is not known what the model passes to its blocks.
        """
        self.bring(index)
        dtype = torch.float32 if index in self.float32_blocks else self.dtype
        args, keywords = self.caught.calls[index]
        output = self.blocks[index](
            hidden.to(self.device, dtype), *self._convert(args, dtype), **self._convert(keywords, dtype)
        )
        self._gives_tuple = isinstance(output, tuple)
        result: Tensor = output[0] if self._gives_tuple else output
        return result

    @property
    def caught(self) -> CaughtCalls:
        """What the model passes to its blocks.

        Raises:
            RuntimeError: If nothing was embedded yet.
        """
        if self._caught is None:
            raise RuntimeError("what the model passes to its blocks is not known; call embed first")
        return self._caught

    @contextmanager
    def after_blocks(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Within it, what the model makes of the output of its last block can be had without the blocks in front.

        The model is called with blocks that hand on what is given, and with what lies outside of the blocks (norm and head,
        most of all) on the device of the blocks. `embed` must have been called before, and of a single block `call`.

        Yields:
            Token ids (B, T) and the output (B, T, H) of the last block to logits (B, T, V), on the device.
        """
        within = {id(t) for block in self.blocks for t in (*block.parameters(), *block.buffers())}
        named = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        outside = {name: t.to(self.device) for name, t in named.items() if id(t) not in within}
        given: list[Tensor] = []

        def logits_of(input_ids: Tensor, hidden: Tensor) -> Tensor:
            given[:] = [hidden.to(self.device, self.dtype)]
            keywords = {"input_ids": input_ids.to(self.device), "use_cache": False}
            logits: Tensor = torch.func.functional_call(self.model, outside, (), keywords).logits
            return logits

        gives_tuple = self._gives_tuple if len(self.blocks) == 1 else self.caught.gives_tuple
        with pass_through(self.blocks, lambda index, args, keywords: given[0], gives_tuple):
            yield logits_of

    def bring(self, index: int) -> None:
        """Makes block `index` the one whose frozen weights are on the device."""
        in_float32 = index in self.float32_blocks
        if self._resident == (index, in_float32):
            return
        self.release()
        block = self.blocks[index]
        self._host = HostTensors(block)
        if in_float32:
            block.to(self.device, torch.float32)
        else:
            block.to(self.device)  # each tensor in its own dtype, which need not be that of the others
        self._resident = index, in_float32

    @contextmanager
    def in_float32(self, blocks: Collection[int]) -> Iterator[None]:
        """Within it, these blocks run in float32, and no others do."""
        before, self.float32_blocks = self.float32_blocks, blocks
        try:
            yield
        finally:
            self.float32_blocks = before

    def release(self) -> None:
        """Gives the resident block its frozen weights on the host again, in the dtypes that they had; nothing is copied."""
        if self._host is not None:
            self._host.put_back()
        self._resident = self._host = None

    def _convert(self, value: Any, dtype: torch.dtype) -> Any:
        """Tensors anywhere in tuples, lists and dicts, on the device, each moved once; those in the model's dtype in another."""
        if isinstance(value, Tensor):
            key = (id(value), dtype)  # `caught` holds it, so that no other tensor can have its id
            if key not in self._moved:
                # Some models hand on rotary embeddings in float32 whatever their own dtype is.
                kind = dtype if value.dtype == self.dtype else value.dtype
                self._moved[key] = value.to(self.device, kind)
            return self._moved[key]
        if isinstance(value, (tuple, list)):
            return type(value)(self._convert(v, dtype) for v in value)
        if isinstance(value, dict):
            return {k: self._convert(v, dtype) for k, v in value.items()}
        return value
