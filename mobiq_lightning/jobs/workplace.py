"""Where the process of a fit keeps what it goes on from: in the run folder, or in a folder of its blocks within that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobiq_lightning.calibration import BlockShare, retries_of
from mobiq_lightning.runs import CHECKPOINTS, RETRIES, Retries, RunFolder, TrainingCheckpoints


@dataclass
class Workplace:
    """The part of a run folder that a process works in.

    Args:
        run: The run folder.
        blocks: The blocks, by index from 0, that the process calibrates alone; None: the whole run is its own.
    """

    run: RunFolder
    blocks: range | None = None

    @property
    def folder(self) -> Path:
        """The folder of its training checkpoints and metrics."""
        return self.run.path if self.blocks is None else self.run.blocks.work_folder(self.blocks)

    @property
    def training(self) -> TrainingCheckpoints:
        """The training checkpoints that it goes on from."""
        return TrainingCheckpoints(self.folder / CHECKPOINTS)

    @property
    def retries(self) -> Retries:
        """How often its blocks were started anew."""
        return Retries(self.folder / RETRIES)

    def share(self, recipe: Mapping[str, Any]) -> BlockShare:
        """The blocks that the process calibrates, and those that are calibrated; damaged ones are named and removed.

        Args:
            recipe: The full recipe.

        Raises:
            RunFolderError: If another version, or another recipe, has made one of them.
        """
        files, known = self.run.blocks.whole(self.blocks), self.retries.counts()
        if self.blocks is None:  # blocks that others have tried again are as if they had been tried again here
            for block, count in retries_of(files, dict(recipe)):
                while known.get(block, 0) < count:
                    known[block] = self.retries.note(block)
        tried = {block: count for block, count in known.items() if block is not None}
        return BlockShare(self.blocks, files, dict(recipe), tried)

    def is_done(self, blocks: range) -> bool:
        """Whether blocks are calibrated."""
        return len(self.run.blocks.whole(blocks)) == len(blocks)

    def said_at_end(self, blocks: range) -> str:
        """What a user is told whose process has calibrated its blocks."""
        done = len({block for block, _ in self.run.blocks.found()})
        own = f"Block {blocks.stop} is" if len(blocks) == 1 else f"Blocks {blocks.start + 1} to {blocks.stop} are"
        return (
            f"{own} calibrated; {self.run.blocks.folder} holds {done} so far. When no process is at work on blocks any more, "
            "`fit` with this recipe and without --blocks takes over what is there, calibrates what is missing, and goes on."
        )
