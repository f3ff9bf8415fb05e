"""Checks that a model whose decoder blocks are called one at a time computes what the model itself does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.calibration.caught_calls import pass_through
from mobiq_lightning.errors import ModelError

_TOKENS = 16
_BLOCKS = 8
_ROUNDINGS = 8
"""Roundings of the largest logit, in the dtype of the model, by which logits may differ."""


@torch.no_grad()
def check_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Compares the logits of a model with those that its blocks give one at a time, on a few tokens.

    Blocks that are built alike and are given the same arguments stand for each other: the first and the last of each kind
    run, eight at most, and the others hand on what they are given. So it takes about as long for a model of 80 blocks as for
    one of four.

    Args:
        model: The causal language model, where its weights lie.
        blocks: Its decoder blocks.

    Raises:
        ModelError: If the logits differ by more than rounding, or the blocks cannot be called one at a time at all; with the
            numbers.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = (torch.arange(_TOKENS) * 7919 % embedding.num_embeddings)[None].to(embedding.weight.device)
    caller = BlockCaller(model, blocks, embedding.weight.device)
    hidden = caller.embed(ids)
    chosen = _representatives(caller)
    kind = type(model).__name__
    others = [index for index in range(len(blocks)) if index not in chosen]

    def hand_on(index: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        given: Tensor = args[0] if args else keywords["hidden_states"]
        return given

    try:
        with pass_through(blocks, hand_on, caller.caught.gives_tuple, others):
            expected = model(input_ids=ids, use_cache=False).logits
        for index in chosen:
            hidden = caller.call(index, hidden)
        with caller.after_blocks() as logits_of:
            found = logits_of(ids, hidden)
    except ModelError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(
            f"model.pretrained: blocks of {kind} cannot be called one at a time ({type(error).__name__}: {reason}): one needs "
            "more of another than its hidden states. This family is not supported"
        ) from error
    finally:
        caller.release()
    if not bool(torch.isfinite(expected).all()):
        return  # then the numbers say nothing of how blocks are called; where they come from is found as calibration begins
    largest = float(expected.float().abs().max())
    difference = float((found.float() - expected.float()).abs().max())
    if not difference <= _ROUNDINGS * torch.finfo(expected.dtype).eps * largest:
        raise ModelError(
            f"model.pretrained: called one at a time, blocks of {kind} give logits that differ by up to {difference:.3g} from "
            f"those of the model itself (which reach {largest:.3g}): one needs more of another than its hidden states. This "
            "family is not supported"
        )


def _representatives(caller: BlockCaller) -> list[int]:
    """Indices of the first and the last block of each kind, in order."""
    kinds: dict[Any, list[int]] = {}
    for index, (block, call) in enumerate(zip(caller.blocks, caller.caught.calls, strict=True)):
        parts = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        kinds.setdefault((type(block), parts, _signature(call)), []).append(index)
    ends = {index for of_kind in kinds.values() for index in (of_kind[0], of_kind[-1])}
    return sorted(ends)[:_BLOCKS]


def _signature(value: Any) -> Any:
    """What tells the arguments of two blocks apart; equal tensors are the same ones."""
    if isinstance(value, Tensor):
        return id(value)
    if isinstance(value, (tuple, list)):
        return tuple(_signature(v) for v in value)
    if isinstance(value, dict):
        return tuple((key, _signature(v)) for key, v in value.items())
    return value if isinstance(value, (bool, int, float, str)) else type(value)
