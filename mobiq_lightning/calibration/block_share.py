"""Which blocks of a run a process calibrates itself, and what it takes over of those that others have calibrated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer

from mobiq_lightning.calibration.schedule import Schedule, Segment
from mobiq_lightning.errors import RecipeError, RunFolderError
from mobiq_lightning.files import sha256, write_atomically
from mobiq_lightning.runs import BlockFiles, GuardEvent, differing_keys_of_runs
from mobiq_lightning.version import __version__

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration


@dataclass
class BlockShare:
    """The part of the first sweep over the blocks that this process does.

    Args:
        own: The blocks, by index, that it calibrates, and nothing else; None: all that nobody else has, and what follows.
        finished: Files of blocks that are calibrated, by index: they are not trained again.
        recipe: The recipe of the run, which is that of its blocks.
        retries: How often a block that is tried again has been, by index.
    """

    own: range | None = None
    finished: dict[int, Path] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    retries: dict[int, int] = field(default_factory=dict)

    def trains(self, segment: Segment) -> bool:
        """Whether a segment is this process's to train, or was."""
        return self.own is None or (segment.sweep == 0 and segment.block in self.own)

    def walks(self, segment: Segment) -> bool:
        """Whether a segment is of a block that is calibrated: its epochs pass without a step."""
        return segment.sweep == 0 and segment.block in self.finished

    def epochs(self, schedule: Schedule) -> range:
        """The epochs of the fit that this process goes through."""
        if self.own is None:
            return range(schedule.n_epochs)
        visits = [s.visit for s in schedule.segments if self.trains(s) and not self.walks(s)]
        return range(visits[0].start, visits[-1].stop)

    def check(self, n_blocks: int) -> None:
        """Makes sure that the model has the blocks.

        Raises:
            RecipeError: If it has not.
        """
        if self.own is not None and self.own.stop > n_blocks:
            raise RecipeError(
                f"--blocks {self.own.start + 1}-{self.own.stop}: the model has {n_blocks} blocks, numbered from 1 to "
                f"{n_blocks}; nothing was calibrated"
            )


def begin_at(trainer: Trainer, epoch: int, steps: int) -> None:
    """Has a fit begin at an epoch as if those before it had been done: epoch and step decide what is drawn at random.

    Args:
        trainer: The trainer, before its fit has begun.
        epoch: The epoch.
        steps: Steps of an optimizer in each epoch.
    """
    done = trainer.fit_loop.epoch_progress.current
    vars(done).update(dict.fromkeys(vars(done), epoch))
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = epoch * steps
    loop._batches_that_stepped = epoch * steps  # the step that loggers are told


# ---------------------------------------------------------------------- files of blocks


def write_block_file(module: ElasticCalibration, block: int, identity: dict[str, str]) -> Path:
    """Writes what was learned of a block, and all that the run needs of it, into a file that is named after its bytes.

    Args:
        module: The calibration, at the end of the visit to the block.
        block: Index of the block.
        identity: Hashes of model and text.

    Raises:
        OSError: If it cannot be written.
    """
    calibrated, record = module.sliced.block_at(block), module.record
    states = module.trainer.optimizers[0].state
    names = [name for name in module.sliced.input_names() if name.startswith(f"{module.layout.blocks}.{block}.")]
    content = {
        "version": __version__,
        "recipe": json.dumps(module.share.recipe),
        "identity": identity,
        "state_dict": calibrated.state_dict(),
        "optimizer": {name: states[p] for name, p in calibrated.named_parameters() if p in states},
        "guards": [event.to_json() for event in record.guards if event.block == block],
        "collapsed": {name: share for name, share in record.collapsed.items() if name in names},
        "given_up": block in record.given_up,
        "retries": module.share.retries.get(block, 0),
    }
    files = BlockFiles(module.run_folder)
    return write_atomically(
        files.folder / files.named(block),
        lambda temporary: torch.save(content, temporary),
        lambda temporary: files.named(block, sha256(temporary)),
    )


def read_block_file(path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What the file of a block holds; its tensors are read from disk when they are looked at.

    Args:
        path: The file, whose bytes are those that were written.
        recipe: The recipe of the run.

    Raises:
        RunFolderError: If it was made by another version, or of another recipe.
    """
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if content["version"] != __version__:
        raise RunFolderError(
            f"{path} was written by version {content['version']}, and this is {__version__}. Go on with that version; or remove "
            "the file, and its block is calibrated again"
        )
    if differing := list(differing_keys_of_runs(json.loads(content["recipe"]), recipe)):
        raise RunFolderError(
            f"{path} is of another recipe:\n  " + "\n  ".join(differing) + "\n"
            "Remove the file, and its block is calibrated again; or go on with the recipe that it has"
        )
    return content


def retries_of(files: dict[int, Path], recipe: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Of blocks that were tried again after NaN or infinity, the index, and how often; reads the files of all blocks.

    Raises:
        RunFolderError: If one was made by another version, or of another recipe.
    """
    for block, path in files.items():
        if count := int(read_block_file(path, recipe)["retries"]):
            yield block, count


def check_block_files(module: ElasticCalibration, identity: dict[str, str]) -> None:
    """Makes sure that the blocks which others have calibrated are of this model and text.

    Args:
        module: The calibration.
        identity: Hashes of model and text.

    Raises:
        RunFolderError: Naming what differs.
    """
    for _, path in BlockFiles(module.run_folder).found():
        stored = read_block_file(path, module.share.recipe)["identity"]
        if changed := [f"{k}: {stored.get(k)} there, {v} here" for k, v in identity.items() if stored.get(k) != v]:
            raise RunFolderError(
                f"{path} is of something else:\n  " + "\n  ".join(changed) + "\n"
                "Files behind model.pretrained or data.source have changed, or are others on the machine that wrote it. Remove "
                "the file, and its block is calibrated again; or start all processes with the same files"
            )


def take_over(module: ElasticCalibration, block: int) -> None:
    """Puts what another process has learned of a block in the place of what it begins with, with all that is known of it.

    Args:
        module: The calibration.
        block: Index of the block, whose file is there.
    """
    content = read_block_file(module.share.finished[block], module.share.recipe)
    calibrated, record = module.sliced.block_at(block), module.record
    calibrated.load_state_dict(content["state_dict"])
    states = module.trainer.optimizers[0].state
    for name, parameter in calibrated.named_parameters():
        states.pop(parameter, None)
        if name in content["optimizer"]:
            kept = content["optimizer"][name]
            states[parameter] = {
                key: value.to(parameter.device, copy=True) if value.dim() else value.clone()
                for key, value in kept.items()
            }
    known = {json.dumps(event.to_json()) for event in record.guards}
    for event in content["guards"]:
        if json.dumps(event) not in known:
            record.note_guard(GuardEvent.from_json(event, str(module.share.finished[block]), "guards"))
    for name, share in content["collapsed"].items():
        record.note_collapse(name, share)
    if content["given_up"]:
        record.give_up(block)
