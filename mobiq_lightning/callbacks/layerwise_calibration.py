"""Turns the epochs of one fit into block after block."""

from __future__ import annotations

import math
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from mobiq_lightning.calibration import (
    ElasticCalibration,
    begin_at,
    begin_stage,
    check_block_files,
    end_stage,
    initialize_transforms,
    move_model,
    require_gradients,
    say_if_short,
    take_over,
    unchanged_weights,
)
from mobiq_lightning.callbacks.base import CalibrationCallback
from mobiq_lightning.callbacks.cut_short import check_epoch_is_whole
from mobiq_lightning.console import say
from mobiq_lightning.environment import give_back_memory
from mobiq_lightning.errors import MobiqError
from mobiq_lightning.runs import IDENTITY, RunFolder, check_identity
from mobiq_lightning.sources import former_fingerprint
from mobiq_lightning.strategies.base import SliceScheme
from mobiq_lightning.strategies.together import gathered


class LayerwiseCalibration(CalibrationCallback):
    """Sets the number of epochs, and keeps the hidden states at the current block, or the whole model where it is trained.

    What is current is derived from the trainer's epoch, which checkpoints restore: after a resume the hidden states
    are computed anew through the blocks that are done, and are bit for bit what they were.
    """

    order = -30  # the current block must be in place before anything else looks at it

    def __init__(self) -> None:
        self.sweep: int | None = None
        self._taken: int | None = None
        self._unchanged = ExitStack()

    def on_fit_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Sets the number of epochs, and makes sure that an interrupted run had this model and this text."""
        if trainer.is_global_zero:
            identity = identity_of(module)
            _check(module, identity)
            check_block_files(module, identity)
            say_if_short(module)
            if module.share.own is None:
                RunFolder(module.run_folder).begin()
        epochs = module.share.epochs(module.schedule)
        trainer.fit_loop.max_epochs = epochs.stop
        if epochs.start:
            batches = math.ceil(module.text.n_windows / module.text.batch_size)
            begin_at(trainer, epochs.start, math.ceil(batches / trainer.accumulate_grad_batches))

    def on_validation_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Makes sure that a finished run is compared with the model that it was calibrated from."""
        if trainer.is_global_zero and (module.run_folder / IDENTITY).is_file():
            _check(module, identity_of(module, text=False))

    def on_train_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Catches up after a resume."""
        self.catch_up(module)

    def on_train_epoch_start(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Moves on when a block or a stage begins; lets transforms begin, and shows weights to routers that look at them."""
        self.catch_up(module)
        segment = module.segment
        if module.walks:
            return
        if module.hidden is not None and segment.sweep == 0 and module.current_epoch == segment.visit.start:
            # Later, a resumed run has them from its checkpoint.
            initialize_transforms(module.blocks_in_training()[0], module.hidden)
        begin_stage(module)
        require_gradients(module)
        for block in module.blocks_in_training():
            block.show_weights_to_routers()
        if module.stage.trains_routers_alone:
            self._unchanged.enter_context(unchanged_weights(module, module.blocks_in_training()))

    def catch_up(self, module: ElasticCalibration) -> None:
        """Brings the hidden states to the current block, or the whole model to the device; does nothing if it is there."""
        segment = module.segment
        if self.sweep != segment.sweep:
            self._leave(module)
            self.sweep = segment.sweep
            if segment.block is None:
                move_model(module)
        if segment.block is None:
            return
        if module.walks:
            self._take_over(module, segment.block)
            return
        if module.hidden is None:
            module.start_hidden_states()
        assert module.hidden is not None
        if module.hidden.block < segment.block:
            if segment.block - module.hidden.block > 1:
                say(_passing(module, segment.block))
            module.hidden.advance(segment.block)
            _forget(module, segment.block)
            give_back_memory()
        module.sliced.caller.bring(segment.block)

    def _take_over(self, module: ElasticCalibration, block: int) -> None:
        """Puts a block in its place that another process has calibrated, unless it is there or this process ends before."""
        if block == self._taken or module.share.own is not None:
            return
        if module.hidden is None:
            module.make_caller()
        take_over(module, block)
        self._taken = block
        say(
            f"Block {block + 1}/{len(module.blocks)} is calibrated: taken over from {module.share.finished[block].name}."
        )

    def on_exception(self, trainer: Trainer, module: ElasticCalibration, exception: BaseException) -> None:
        """Lets go of the weights that are kept within an epoch."""
        self._unchanged.close()

    def _leave(self, module: ElasticCalibration) -> None:
        """Ends a sweep or a model stage: tables and frozen weights leave the device."""
        module.end_hidden_states()
        _forget(module, len(module.blocks))
        give_back_memory()

    def on_train_epoch_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """At the end of a block, shows routers its final weights, and makes sure that all processes learned the same."""
        self._unchanged.close()
        check_epoch_is_whole(trainer, module)
        if module.walks:
            return
        end_stage(module)
        if not module.schedule.ends_visit(module.current_epoch):
            return
        for block in module.blocks_in_training():
            block.show_weights_to_routers()
        if trainer.world_size > 1:
            learned = [p for block in module.blocks_in_training() for p in block.parameters()]
            values = [p.detach().double().sum() for p in learned]
            sums = gathered(torch.stack(values)[None])
            if not torch.equal(sums, sums[:1].expand_as(sums)):
                place = "the whole model" if module.block_index is None else f"block {module.block_index + 1}"
                raise MobiqError(
                    f"{place}: the {trainer.world_size} processes learned different values. "
                    "Use trainer.strategy ddp_find_unused_parameters_true, or one device"
                )

    def on_train_end(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Releases the tables and the device memory of the last block."""
        self._leave(module)
        self.sweep = None
        shutil.rmtree(module.hidden_states_folder, ignore_errors=True)


def _forget(module: ElasticCalibration, n_blocks: int) -> None:
    """Lets the slice schemes of the first blocks give up what they keep of their weights."""
    for index in range(n_blocks):
        for scheme in module.sliced.block_at(index).schemes.values():
            if isinstance(scheme, SliceScheme):
                scheme.forget()


def _passing(module: ElasticCalibration, count: int) -> str:
    """What is said while all windows go through so many blocks, which may take a while."""
    if module.block_inputs == "full":
        return f"Passing the calibration windows through {count} blocks in full precision, up to block {count + 1}."
    return f"Resuming: passing the calibration windows through {count} finished blocks."


def identity_of(module: ElasticCalibration, text: bool = True) -> dict[str, str]:
    """Hashes of the model and, as asked for, of the calibration text."""
    source = module.sliced.source
    identity = {"source weights": source.fingerprint, "tokenizer": source.tokenizer_hash}
    return identity | ({"calibration tokens": module.text.calibration_digest} if text else {})


def _check(module: ElasticCalibration, identity: dict[str, str]) -> None:
    """Compares the model, and the text, with those that the run was started with."""
    check_identity(module.run_folder, identity, partial(_former_identity, module.sliced.source.folder))


def _former_identity(folder: Path) -> dict[str, str]:
    """What a run of an earlier version has of the model in a folder."""
    return {"source weights": former_fingerprint(folder)}
