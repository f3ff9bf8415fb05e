"""Turns the epochs of one fit into block after block."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mobiq_lightning.console import say
from mobiq_lightning.errors import MobiqError
from mobiq_lightning.module import ElasticCalibration
from mobiq_lightning.run_folder import check_identity
from mobiq_lightning.strategies.base import SliceScheme
from mobiq_lightning.transforming import initialize_transforms


class LayerwiseCalibration(Callback):
    """Sets the number of epochs to blocks times epochs per block, and keeps the hidden states at the current block.

    Which block is current is derived from the trainer's epoch, which checkpoints restore: after a resume the hidden states
    are computed anew through the blocks that are done, and are bit for bit what they were.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the number of epochs, and makes sure that an interrupted run had this model and this text."""
        module = checked(pl_module)
        if trainer.is_global_zero:
            check_identity(module.run_folder, module.identity())
        trainer.fit_loop.max_epochs = len(module.blocks) * module.epochs_per_block

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catches up after a resume."""
        self.catch_up(trainer, checked(pl_module))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves on when a block begins; lets transforms begin, and shows weights to the routers that look at them."""
        module = checked(pl_module)
        self.catch_up(trainer, module)
        block = module.block_at(module.block_index)
        if module.current_epoch % module.epochs_per_block == 0:  # later, a resumed run has them from its checkpoint
            assert module.hidden is not None
            initialize_transforms(block, module.hidden)
        block.show_weights_to_routers()

    def catch_up(self, trainer: Trainer, module: ElasticCalibration) -> None:
        """Brings the hidden states to the current block; does nothing if they are there."""
        if module.hidden is None:
            module.start_hidden_states(trainer.datamodule.calibration_ids())  # type: ignore[attr-defined]
        assert module.hidden is not None
        if module.hidden.block < module.block_index:
            if module.block_index - module.hidden.block > 1:
                say(f"Resuming: passing the calibration windows through {module.block_index} finished blocks.")
            module.hidden.advance(module.block_index)
            _forget(module, module.block_index)
        module.caller.bring(module.block_index)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of a block, shows routers its final weights, and makes sure that all processes learned the same."""
        module = checked(pl_module)
        if (module.current_epoch + 1) % module.epochs_per_block != 0:
            return
        module.block_at(module.block_index).show_weights_to_routers()
        if trainer.world_size > 1:
            values = [p.detach().double().sum() for p in module.block_at(module.block_index).parameters()]
            sums: Any = module.all_gather(torch.stack(values))
            if not torch.equal(sums, sums[:1].expand_as(sums)):
                raise MobiqError(
                    f"block {module.block_index + 1}: the {trainer.world_size} processes learned different values. "
                    "Use trainer.strategy ddp_find_unused_parameters_true, or one device"
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Releases the tables and the device memory of the last block."""
        module = checked(pl_module)
        module.hidden = None
        module.caller.release()
        _forget(module, len(module.blocks))
        shutil.rmtree(module.hidden_states_folder, ignore_errors=True)


def _forget(module: ElasticCalibration, n_blocks: int) -> None:
    """Lets the slice schemes of the first blocks give up what they keep of their weights."""
    for index in range(n_blocks):
        for scheme in module.block_at(index).schemes.values():
            if isinstance(scheme, SliceScheme):
                scheme.forget()


def checked(module: LightningModule) -> ElasticCalibration:
    """`module` as the one that this package's callbacks work on.

    Raises:
        TypeError: If it is another.
    """
    if not isinstance(module, ElasticCalibration):
        raise TypeError(f"this callback works on ElasticCalibration, not on {type(module).__name__}")
    return module
