"""Inputs and targets of the block being calibrated, for every calibration window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.sources import check_output

TARGETS = "targets"
"""Name of the table of targets, beside the names of input streams."""

Storage = Literal["device", "host", "disk"]
BlockInputs = Literal["calibrated", "full"]
"""What blocks are trained on: what the calibrated blocks before them give, or what the full-precision model gives."""
Reading = Callable[[int, int], AbstractContextManager[Any]]
"""Puts a block (by index) into the precision in which a stream goes through it, for one batch (by index)."""
Keeping = Callable[[int], AbstractContextManager[Any]]
"""Has a block (by index) keep the weights that it makes of its slices, while all batches of a stream go through it."""


class HiddenStates:
    """Tables of inputs and targets, advanced block by block.

    A table goes through a block in place, batch by batch: there is one for each stream, and one of the targets. If that is
    interrupted, the tables are of no more use; they are made anew from the windows and the blocks that are done. Where inputs
    are those of the full-precision model, the targets of a block are the inputs of the next one: there are two tables, whatever
    the streams, and nothing that was calibrated is in them.

    Args:
        caller: Calls the blocks.
        input_ids: (N, T) calibration windows.
        streams: For each input stream its name and how it reads the blocks that it has passed.
        full_precision: How the blocks are read whose outputs are the targets.
        batch_size: Windows per call of a block.
        storage: Where the tables lie.
        folder: The folder of the tables, if they lie on disk.
        keeping: Keeps weights while a stream goes through a block; by default they are made for each batch.
        block_inputs: Whether streams go through the blocks as they read them, or all hold what the full-precision model gives.

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
        block_inputs: BlockInputs = "calibrated",
    ) -> None:
        self.keeping, self.block_inputs = keeping, block_inputs
        self.caller, self.streams, self.full_precision = caller, streams, full_precision
        self.batch_size, self.storage, self.folder = batch_size, storage, folder
        self.block = 0
        inputs = self._place(caller.embed_all(input_ids), "embedding")
        # Until the first block is done all streams are the embedding: one table serves them.
        self.inputs: dict[str, Tensor] = dict.fromkeys(streams, inputs)
        self.targets = self._through(0, inputs, TARGETS, full_precision, self._place(_like(inputs), TARGETS))

    def advance(self, block: int) -> None:
        """Moves on to `block`: inputs go through the blocks before it, targets through it."""
        while self.block < block:
            if self.block_inputs == "full":
                self._advance_full()
                continue
            for name, reading in self.streams.items():
                table = self.inputs[name]
                shared = sum(other is table for other in self.inputs.values()) > 1  # the embedding, by streams to come
                out = self._place(_like(table), name) if shared else table
                self.inputs[name] = self._through(self.block, table, name, reading, out)
            self.block += 1
            self.targets = self._through(self.block, self.targets, TARGETS, self.full_precision, self.targets)

    def _advance_full(self) -> None:
        """Moves on by one block: what left it is what enters the next one, and the room of its inputs takes what leaves that."""
        self.block += 1
        room = next(iter(self.inputs.values()), self.targets)
        self.inputs = dict.fromkeys(self.streams, self.targets)
        self.targets = self._through(self.block, self.targets, TARGETS, self.full_precision, room)

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
