"""The source model of a calibration with sliced linears in its blocks, and what is learned of them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from mobiq_lightning.calibration.apply_transform import check_experts, fold_into_source
from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.errors import ModelError
from mobiq_lightning.nn import (
    BlockLayout,
    CalibratedBlock,
    HostTensors,
    RoutedInput,
    RouterFactory,
    Share,
    SliceFactory,
)
from mobiq_lightning.sources import Source
from mobiq_lightning.strategies.base import SliceScheme
from mobiq_lightning.strategies.transform_base import Transform


class SlicedSource:
    """A frozen source model, what is learned of its decoder blocks, and the means to call single blocks.

    A plain object, which PyTorch does not look into: a module that holds it saves and moves what it registers itself, that
    is `blocks`, and never the frozen weights of the source model.

    Args:
        source: The loaded source model.
        layout: Where the decoder blocks of the model are; it prepares the model for being sliced.
        blocks: What is learned of each block, a `CalibratedBlock` each; empty until `slice_blocks`.
        slices: Makes the slice scheme of a linear from (out_features, in_features).
        router: Makes the router of an input from (in_features, n_slices).
        transform: What is done to weights and inputs before weights are sliced.
        share_routers: Whether linears that read the same input share a router.
    """

    def __init__(
        self,
        source: Source,
        layout: BlockLayout,
        blocks: nn.ModuleList,
        *,
        slices: SliceFactory,
        router: RouterFactory,
        transform: Transform,
        share_routers: Share,
    ) -> None:
        self.source, self.layout, self.blocks = source, layout, blocks
        self.slices, self.router, self.transform, self.share_routers = slices, router, transform, share_routers
        self._caller: BlockCaller | None = None
        self._host: HostTensors | None = None
        layout.open(source.model)

    def slice_blocks(self) -> None:
        """Replaces the linears of the decoder blocks by sliced ones.

        Raises:
            ModelError: If the transform changes what the model computes, or a layout of one's own names linears that no block
                has.
        """
        decoder = self.decoder
        self._check_names(decoder)
        groups = [self.layout.group_linears(block, self.share_routers) for block in decoder]
        check_experts(self.layout, list(decoder), self.transform)
        fold_into_source(self.source, decoder, self.transform)
        for block, of_block in zip(decoder, groups, strict=True):
            self.blocks.append(CalibratedBlock(block, of_block, self.slices, self.router, self.transform))
        for position, routed in enumerate(self.all_inputs()):
            routed.router.place(position, len(self.all_inputs()))

    def _check_names(self, decoder: nn.ModuleList) -> None:
        """Raises a `ModelError` if shared inputs name no linear; those of the default are of several families."""
        if self.layout.shared_inputs == BlockLayout().shared_inputs:
            return
        own = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
        unknown = [name for group in self.layout.shared_inputs for name in group if name not in own]
        if unknown:
            raise ModelError(
                f"model.layout.shared_inputs: no block has {', '.join(unknown)}; its linears are {', '.join(sorted(own))}"
            )

    @property
    def decoder(self) -> nn.ModuleList:
        """The decoder blocks of the source model."""
        return self.layout.find(self.source.model)

    def block_at(self, index: int) -> CalibratedBlock:
        """What is learned of decoder block `index`."""
        block = self.blocks[index]
        assert isinstance(block, CalibratedBlock)
        return block

    def calibrated_blocks(self) -> list[CalibratedBlock]:
        """What is learned of all decoder blocks, in order."""
        return [self.block_at(index) for index in range(len(self.blocks))]

    def all_inputs(self) -> list[RoutedInput]:
        """The routed inputs of all blocks, in order."""
        return [routed for block in self.calibrated_blocks() for routed in block.routed_inputs()]

    def input_names(self) -> list[str]:
        """Names of the routed inputs in the order of `all_inputs`: the block and the first linear that reads the input."""
        return [
            f"{self.layout.blocks}.{index}.{key.replace('-', '.')}"
            for index, block in enumerate(self.calibrated_blocks())
            for key in block.inputs
        ]

    def resized_tensors(self) -> list[str]:
        """Names, below `blocks`, of the tensors whose sizes change while they are trained."""
        return [
            f"{index}.schemes.{key}.{name}"
            for index, block in enumerate(self.calibrated_blocks())
            for key, scheme in block.schemes.items()
            if isinstance(scheme, SliceScheme)
            for name in scheme.resized_tensors()
        ]

    @property
    def caller(self) -> BlockCaller:
        """Calls single blocks of the source model."""
        assert self._caller is not None, "make_caller comes first"
        return self._caller

    def make_caller(self, device: torch.device, float32_blocks: Collection[int]) -> None:
        """Prepares calling single blocks.

        Args:
            device: Where blocks run.
            float32_blocks: Indices of the blocks that run in float32, whatever the dtype of the model.
        """
        self.leave_device()
        self._caller = BlockCaller(self.source.model, list(self.decoder), device, float32_blocks)

    def enter_device(self, device: torch.device) -> None:
        """Moves the whole source model to a device, until `leave_device`; no block is there alone any more."""
        self.leave_device()
        if next(self.source.model.parameters()).device != device:
            self._host = HostTensors(self.source.model)
            self.source.model.to(device)

    def leave_device(self) -> None:
        """Gives the source model, or the block that is on a device alone, its weights on the host again."""
        if self._caller is not None:
            self._caller.release()
        if self._host is not None:
            self._host.put_back()
        self._host = None

    def replace_source(self, source: Source) -> None:
        """Takes another loaded source model in the place of the one that was sliced, which is let go."""
        self._caller = self._host = None
        self.source = source
        self.layout.open(source.model)
