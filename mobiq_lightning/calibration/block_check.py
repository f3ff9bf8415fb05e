"""Checks that a model whose decoder blocks are called one at a time computes what the model itself does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.calibration.caught_calls import pass_through
from mobiq_lightning.errors import ModelError
from mobiq_lightning.nn import BlockLayout, experts_of

_TOKENS = 16
_ROWS = 2
"""Rows of tokens; more than the one that is caught, as in calibration."""
_BLOCKS = 8
_ROUNDINGS = 8
"""Roundings of the largest logit, in the dtype of the model, by which logits may differ."""


@torch.no_grad()
def check_blocks(model: nn.Module, blocks: Sequence[nn.Module], layout: BlockLayout) -> None:
    """Compares the logits of a model with those that its blocks give one at a time, on a few tokens.

    Whether blocks call the linears that are to be sliced is seen on the way: a block that multiplies with the weight of one
    itself would neither give calibration its inputs nor read slices.

    Blocks that are built alike and are given the same arguments stand for each other: the first and the last of each kind
    run, eight at most, and the others hand on what they are given. So it takes about as long for a model of 80 blocks as for
    one of four.

    Args:
        model: The causal language model, where its weights lie.
        blocks: Its decoder blocks.
        layout: Which linears of a block are to be sliced.

    Raises:
        ModelError: If the logits differ by more than rounding, or the blocks cannot be called one at a time at all, with the
            numbers; or if a linear to be sliced is never called.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = (torch.arange(_ROWS * _TOKENS) * 7919 % embedding.num_embeddings).view(_ROWS, -1).to(embedding.weight.device)
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
        with _calls_seen([blocks[index] for index in chosen], layout) as never_called:
            for index in chosen:
                hidden = caller.call(index, hidden)
        with caller.after_blocks() as logits_of:
            found = logits_of(ids, hidden)
    except ModelError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(
            f"model.pretrained: blocks of {kind} cannot be called one at a time: one needs more of another than its hidden "
            "states, or what the model passes to it depends on how many windows there are. This family is not supported "
            f"({type(error).__name__}: {reason})"
        ) from error
    finally:
        caller.release()
    if never_called:
        raise ModelError(
            f"model.pretrained: blocks of {kind} never call {', '.join(never_called)}, so that what they read is not known and "
            "their slices could not be read: they multiply with the weights themselves. This family is not supported"
        )
    _refuse_differing(kind, found, expected)


def _refuse_differing(kind: str, found: Tensor, expected: Tensor) -> None:
    """Raises a `ModelError` if logits (B, T, V) of blocks called one at a time are not those of the model, up to rounding."""
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


@contextmanager
def _calls_seen(blocks: Sequence[nn.Module], layout: BlockLayout) -> Iterator[list[str]]:
    """Within it, calls of linears are seen; the list yielded holds, afterwards, the names of those that none was seen of.

    Of experts, which a few tokens need not go to, one linear stands for all.
    """
    called: set[nn.Module] = set()
    with ExitStack() as hooks:
        for block in blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    handle = module.register_forward_pre_hook(lambda linear, _: called.add(linear))
                    hooks.callback(handle.remove)
        never: list[str] = []
        yield never
    for block in blocks:
        for names in layout.group_linears(block, "input"):
            unseen = [name for name in names if block.get_submodule(name) not in called]
            some = len(unseen) < len(names) and experts_of(block, names[0]) is not None
            never += [name for name in unseen if not some and name not in never]


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
