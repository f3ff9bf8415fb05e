"""What transforms do to the source model before it is sliced, and to a block before it is calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.calibration.block_batch import ROUTED
from mobiq_lightning.calibration.hidden_states import HiddenStates
from mobiq_lightning.console import say
from mobiq_lightning.errors import ModelError
from mobiq_lightning.nn import BlockLayout, CalibratedBlock, experts_of, full_precision
from mobiq_lightning.sources import Source
from mobiq_lightning.strategies.transform_base import Transform

PROBE_ROWS, PROBE_TOKENS = 2, 16
"""Texts, and tokens of each, on which the source model is compared with itself."""
INITIAL_WINDOWS = 8
"""Calibration windows, the first ones, from which the transforms of a block begin."""


def fold_into_source(source: Source, blocks: nn.ModuleList, transform: Transform) -> None:
    """Lets a transform change the weights of the source model, and makes sure that it still computes what it did.

    Logits are compared, relative to their spread over the vocabulary. They may differ by the square root of the precision
    of the model's dtype: 3.5e-4 in float32, 0.088 in bfloat16, 0.031 in float16. What is not covered by a transform shows
    as a difference of the order of 1.

    Raises:
        ModelError: If the logits differ by more.
    """
    if not transform.changes_model:
        return
    before = _probe(source.model)
    source.config_changes = transform.change_model(source.model, blocks)
    spread = (before - before.mean(-1, keepdim=True)).norm()
    difference = float((_probe(source.model) - before).norm() / spread)
    allowed = torch.finfo(source.model.dtype).eps ** 0.5
    name = type(transform).__name__
    if not difference <= allowed:
        raise ModelError(
            f"model.transform: {name} changed what {source.name} ({type(source.model).__name__}) computes: its logits on "
            f"{PROBE_ROWS * PROBE_TOKENS} tokens differ by {difference:.2g} of their spread, {allowed:.2g} are allowed for "
            f"{source.model.dtype}. The model has something that the transform does not cover; take another, or none"
        )
    say(f"{name}: the logits of {source.name} differ by {difference:.1e} of their spread; {allowed:.1e} are allowed.")


def check_experts(layout: BlockLayout, blocks: Sequence[nn.Module], transform: Transform) -> None:
    """Refuses transforms of inputs for blocks with experts, whose second linears read what no transform is learned for.

    Raises:
        ModelError: Naming the transform.
    """
    for block in blocks:
        for names in layout.group_linears(block, "input"):
            experts = experts_of(block, names[0])
            if experts is not None and transform.for_input(1) is not None:
                raise ModelError(
                    f"model.transform: {type(transform).__name__} learns scales of inputs, which experts ({experts} in "
                    f"{type(block).__name__}) do not have; take NoTransform, or leave experts in full precision with "
                    "model.layout.experts false"
                )


@torch.no_grad()
def initialize_transforms(calibrated: CalibratedBlock, hidden: HiddenStates) -> None:
    """Lets the transforms of a block begin, from what its linears read in full precision on the first windows.

    A function of the blocks before and of the text, so that every process and every resumed run begins with the same.

    Args:
        calibrated: What is learned of the block.
        hidden: Stands at the block.
    """
    if not calibrated.transforms():
        return
    read: dict[nn.Module, Tensor] = {}
    hooks = [
        linears[0].register_forward_pre_hook(lambda linear, args: read.update({linear: args[0]}))
        for _, linears in calibrated.readers
    ]
    try:
        with full_precision(calibrated.routed_inputs()):
            stream = ROUTED if ROUTED in hidden.inputs else next(iter(hidden.inputs))
            rows = min(INITIAL_WINDOWS, len(hidden.inputs[stream]))
            hidden.caller.call(hidden.block, hidden.batch(stream, torch.arange(rows)))
    finally:
        for hook in hooks:
            hook.remove()
    for routed, linears in calibrated.readers:
        if routed.transform is not None:
            routed.transform.initialize(read[linears[0]].flatten(0, -2), [linear.weight for linear in linears])


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """Logits (B, T, V) of some tokens, float32."""
    ids = torch.arange(PROBE_ROWS * PROBE_TOKENS).mul(7919).remainder(model.config.vocab_size)
    logits: Tensor = model(input_ids=ids.view(PROBE_ROWS, PROBE_TOKENS), use_cache=False).logits
    return logits.float()
