"""Inputs and targets of the block being calibrated, for every calibration window.

Decoder blocks are called, never re-implemented: what the model passes to its first block, keywords and all, is caught
once and passed on to every block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mobiq_lightning.nn import HostTensors
from mobiq_lightning.sources import check_output

TARGETS = "targets"
"""Name of the table of targets, beside the names of input streams."""

Storage = Literal["device", "host", "disk"]
Reading = Callable[[int, int], AbstractContextManager[Any]]
"""Puts a block (by index) into the precision in which a stream goes through it, for one batch (by index)."""
Keeping = Callable[[int], AbstractContextManager[Any]]
"""Has a block (by index) keep the weights that it makes of its slices, while all batches of a stream go through it."""


class _CaughtInput(Exception):  # noqa: N818 - a signal, not an error
    """Ends the forward pass of the model once the input of its first block is known."""


class BlockCaller:
    """Calls the decoder blocks of a model one at a time, each with what the model itself would pass.

    Args:
        model: The causal language model.
        blocks: Its decoder blocks.
        device: Where blocks run. Only the block that runs is there; the others stay where they are.
        float32_blocks: Blocks that run in float32 until `release`, whatever the dtype of the model.
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
        self.keywords: dict[str, Any] = {}
        self._resident: int | None = None
        self._host: HostTensors | None = None
        self._gives_tuple = False

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """Inputs of the first block.

        Args:
            input_ids: (B, T); T must be the same in every call.

        Returns:
            (B, T, H) on the device of the model's embedding.
        """
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs.pop("hidden_states"))
            self.keywords = kwargs
            raise _CaughtInput

        handle = self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
            self.model(input_ids=input_ids.to(device), use_cache=False)
        except _CaughtInput:
            pass
        finally:
            handle.remove()
        return caught[0]

    @torch.no_grad()
    def embed_all(self, input_ids: Tensor) -> Tensor:
        """Inputs (N, T, H) of the first block for windows (N, T), one window at a time.

        With one window the keywords that are kept have a batch dimension of 1, which fits any batch.
        """
        return torch.cat([self.embed(window) for window in input_ids.split(1)])

    def call(self, index: int, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H): block `index` on the device."""
        self.bring(index)
        dtype = torch.float32 if index in self.float32_blocks else self.dtype
        output = self.blocks[index](hidden.to(self.device, dtype), **_convert(self.keywords, self.device, dtype))
        self._gives_tuple = isinstance(output, tuple)
        result: Tensor = output[0] if self._gives_tuple else output
        return result

    @contextmanager
    def after_blocks(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Within it, what the model makes of the output of its last block can be had without the blocks in front.

        The model is called with blocks that hand on what is given, and with what lies outside of the blocks (norm and head,
        most of all) on the device of the blocks. At least one block must have been called before.

        Yields:
            Token ids (B, T) and the output (B, T, H) of the last block to logits (B, T, V), on the device.
        """
        within = {id(t) for block in self.blocks for t in (*block.parameters(), *block.buffers())}
        named = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        outside = {name: t.to(self.device) for name, t in named.items() if id(t) not in within}
        given: list[Tensor] = []

        def hand_on(*args: Any, **kwargs: Any) -> Any:
            return (given[0],) if self._gives_tuple else given[0]

        @torch.no_grad()
        def logits_of(input_ids: Tensor, hidden: Tensor) -> Tensor:
            given[:] = [hidden.to(self.device, self.dtype)]
            keywords = {"input_ids": input_ids.to(self.device), "use_cache": False}
            logits: Tensor = torch.func.functional_call(self.model, outside, (), keywords).logits
            return logits

        for block in self.blocks:
            block.forward = hand_on
        try:
            yield logits_of
        finally:
            for block in self.blocks:
                del block.forward  # the class's own again

    def bring(self, index: int) -> None:
        """Makes block `index` the one whose frozen weights are on the device."""
        if self._resident == index:
            return
        self.release()
        self._host = HostTensors(self.blocks[index])
        self.blocks[index].to(self.device, torch.float32 if index in self.float32_blocks else self.dtype)
        self._resident = index

    def release(self) -> None:
        """Gives the resident block its frozen weights on the host again, in the dtype of the model; nothing is copied."""
        if self._host is not None:
            self._host.put_back()
        self._resident = self._host = None


class HiddenStates:
    """Tables of inputs and targets, advanced block by block.

    A table goes through a block in place, batch by batch: there is one for each stream, and one of the targets. If that is
    interrupted, the tables are of no more use; they are made anew from the windows and the blocks that are done.

    Args:
        caller: Calls the blocks.
        input_ids: (N, T) calibration windows.
        streams: For each input stream its name and how it reads the blocks that it has passed.
        full_precision: How the blocks are read whose outputs are the targets.
        batch_size: Windows per call of a block.
        storage: Where the tables lie.
        folder: The folder of the tables, if they lie on disk.
        keeping: Keeps weights while a stream goes through a block; by default they are made for each batch.

    Raises:
        ModelError: If the full-precision model gives inputs or targets that are not finite, here or later.
        GuardError: If calibrated blocks give inputs that are not finite.
    """

    def __init__(
        self,
        caller: BlockCaller,
        input_ids: Tensor,
        streams: dict[str, Reading],
        full_precision: Reading,
        batch_size: int,
        storage: Storage = "host",
        folder: Path | None = None,
        keeping: Keeping = nullcontext,
    ) -> None:
        self.keeping = keeping
        self.caller, self.streams, self.full_precision = caller, streams, full_precision
        self.batch_size, self.storage, self.folder = batch_size, storage, folder
        self.block = 0
        inputs = self._place(caller.embed_all(input_ids), "embedding")
        # Until the first block is done all streams are the embedding: one table serves them.
        self.inputs: dict[str, Tensor] = dict.fromkeys(streams, inputs)
        self.targets = self._through(0, inputs, TARGETS, full_precision, self._place(_like(inputs), TARGETS))

    def advance(self, block: int) -> None:
        """Moves on to `block`: inputs go through the calibrated blocks before it, targets through it."""
        while self.block < block:
            for name, reading in self.streams.items():
                table = self.inputs[name]
                shared = sum(other is table for other in self.inputs.values()) > 1  # the embedding, by streams to come
                out = self._place(_like(table), name) if shared else table
                self.inputs[name] = self._through(self.block, table, name, reading, out)
            self.block += 1
            self.targets = self._through(self.block, self.targets, TARGETS, self.full_precision, self.targets)

    def batch(self, name: str, index: Tensor) -> Tensor:
        """(B, T, H) inputs of a stream for windows `index` (B,), on the device of the blocks."""
        return self._rows(self.inputs[name], index)

    def target_batch(self, index: Tensor) -> Tensor:
        """(B, T, H) targets for windows `index` (B,), on the device of the blocks."""
        return self._rows(self.targets, index)

    def _rows(self, table: Tensor, index: Tensor) -> Tensor:
        return table[index.to(table.device)].to(self.caller.device, non_blocking=True)

    @torch.no_grad()
    def _through(self, block: int, table: Tensor, name: str, reading: Reading, out: Tensor) -> Tensor:
        """Writes what `block` makes of a table (N, T, H) into `out`, which may be the table itself, and gives it."""
        with self.keeping(block):
            for number, start in enumerate(range(0, table.shape[0], self.batch_size)):
                with reading(block, number):
                    call = partial(self.caller.call, block, table[start : start + self.batch_size])
                    rows = call().to(out.device, out.dtype)
                    self._check(rows, block, call, name)
                out[start : start + self.batch_size] = rows
        return out

    def _check(self, rows: Tensor, block: int, call: Callable[[], Tensor], name: str) -> None:
        """Refuses rows that are not finite before anything is trained on them."""
        reading = "" if name == TARGETS else f"{name} bits" if name.isdecimal() else f"{name} depths"
        place = f"block {block + 1}/{len(self.caller.blocks)}"
        check_output(rows, self.caller.blocks[block], call, place, reading)

    def _place(self, table: Tensor, name: str) -> Tensor:
        """`table`, or an empty one if it is on the meta device, where the tables lie."""
        if self.storage == "disk":
            if self.folder is None:
                raise ValueError("storage 'disk' needs a folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{name}.bin"
            path.unlink(missing_ok=True)  # tables still mapped from the old file keep it until they are dropped
            size = table.numel()
            placed = torch.from_file(str(path), shared=True, size=size, dtype=table.dtype).reshape(table.shape)
        else:
            device = self.caller.device if self.storage == "device" else torch.device("cpu")
            placed = torch.empty(table.shape, dtype=table.dtype, device=device)
        if table.device.type != "meta":
            placed.copy_(table)
        return placed


def _like(table: Tensor) -> Tensor:
    """The shape and dtype of a table, without its bytes."""
    return torch.empty_like(table, device="meta")


@contextmanager
def eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, the modules are in eval mode."""
    before = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.train(training)


def _convert(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors anywhere in tuples, lists and dicts, moved to a device; floating ones in a dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_convert(v, device, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _convert(v, device, dtype) for k, v in value.items()}
    return value
