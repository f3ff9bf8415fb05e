"""What a model passes to each of its decoder blocks beside hidden states, caught without computing a block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.errors import ModelError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments after the hidden states, and keywords."""
_AS_ONE = "blocks cannot be calibrated one at a time, and the family is not supported"


@dataclass(frozen=True)
class CaughtCalls:
    """What a model passes to its decoder blocks beside hidden states.

    Args:
        calls: For each block, positional arguments after the hidden states, and keywords; tensors of the same values are one.
        n_tokens: Tokens T of a row, which masks and rotary embeddings are made for.
        gives_tuple: Whether the model takes the first element of what a block returns; not known of a single block.
    """

    calls: list[Call]
    n_tokens: int
    gives_tuple: bool


class _Done(Exception):  # noqa: N818 - a signal, not an error
    """Ends the forward pass of the model once the call of its last block is known."""


@contextmanager
def pass_through(
    blocks: Sequence[nn.Module],
    forward: Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor],
    gives_tuple: bool,
    indices: Sequence[int] | None = None,
) -> Iterator[None]:
    """Within it, decoder blocks compute nothing and return what a function gives.

    Args:
        blocks: Decoder blocks of a model.
        forward: Gives the output (B, T, H) from index, positional arguments and keywords of a block.
        gives_tuple: Whether blocks are to return a tuple of one.
        indices: Which of the blocks; by default all.
    """
    bypassed = range(len(blocks)) if indices is None else indices

    def forward_of(index: int) -> Callable[..., Any]:
        def hand_on(*args: Any, **keywords: Any) -> Any:
            hidden = forward(index, args, keywords)
            return (hidden,) if gives_tuple else hidden

        return hand_on

    for index in bypassed:
        blocks[index].forward = forward_of(index)
    try:
        yield
    finally:
        for index in bypassed:
            del blocks[index].forward  # the class's own again


@torch.no_grad()
def catch_calls(model: nn.Module, blocks: Sequence[nn.Module], input_ids: Tensor) -> CaughtCalls:
    """Catches what a model passes to its decoder blocks, in passes in which blocks hand on what they are given.

    Args:
        model: The causal language model.
        blocks: Its decoder blocks.
        input_ids: (1, T) tokens, on the device of the model's embedding.

    Raises:
        ModelError: If hidden states are not handed from block to block as they are, or what is passed beside them depends on
            the tokens.
    """
    gives_tuple = False
    try:
        calls = _passed(model, blocks, input_ids, gives_tuple)
    except Exception as error:  # noqa: BLE001 - of whatever kind: a model that expects a tuple fails in ways of its own
        gives_tuple = True
        calls = _passed_or_refused(model, blocks, input_ids, error)
    others = (input_ids + 1) % model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    again = _passed(model, blocks, others, gives_tuple)
    kind = type(model).__name__
    for index, (first, second) in enumerate(zip(calls, again, strict=True)):
        if (named := _differing(blocks[index], first, second)) is not None:
            raise ModelError(
                f"model.pretrained: {kind} passes {named} to block {index + 1}/{len(blocks)}, which depends on the tokens and "
                f"not on their place alone; {_AS_ONE}"
            )
    known: list[Tensor] = []
    return CaughtCalls([_shared(call, known) for call in calls], input_ids.shape[1], gives_tuple)


def _passed_or_refused(
    model: nn.Module, blocks: Sequence[nn.Module], input_ids: Tensor, without_tuple: Exception
) -> list[Call]:
    """What the model passes to each block, where a block returns a tuple; else why that is not known either way."""
    try:
        return _passed(model, blocks, input_ids, gives_tuple=True)
    except ModelError:
        raise
    except Exception as error:
        if isinstance(without_tuple, ModelError):
            raise without_tuple from error
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(
            f"model.pretrained: {type(model).__name__} does not run with blocks that hand on their input "
            f"({type(error).__name__}: {reason}), so it needs more of a block than hidden states; {_AS_ONE}"
        ) from error


def _passed(model: nn.Module, blocks: Sequence[nn.Module], input_ids: Tensor, gives_tuple: bool) -> list[Call]:
    """What the model passes to each block, where a block returns its input."""
    calls: list[Call] = []
    hidden: list[Tensor] = []

    def hand_on(index: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        keywords = dict(keywords)
        given: Tensor = args[0] if args else keywords.pop("hidden_states")
        if index != len(calls):
            raise ModelError(
                f"model.pretrained: {type(model).__name__} calls block {index + 1} where block {len(calls) + 1} of "
                f"{len(blocks)} was expected; {_AS_ONE}"
            )
        if hidden and not _same(given, hidden[-1]):
            raise ModelError(
                f"model.pretrained: {type(model).__name__} changes hidden states between block {index} and block {index + 1} "
                f"of {len(blocks)}; {_AS_ONE}"
            )
        calls.append((args[1:], keywords))
        hidden[:] = [given]
        if len(calls) == len(blocks):
            raise _Done
        return given

    with pass_through(blocks, hand_on, gives_tuple):
        try:
            model(input_ids=input_ids, use_cache=False)
        except _Done:
            return calls
    raise ModelError(
        f"model.pretrained: {type(model).__name__} called {len(calls)} of its {len(blocks)} blocks; {_AS_ONE}"
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two values passed to a block are the same; tensors by shape, dtype and values."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    # Objects of the model's own, such as an empty cache, are made anew in every pass.
    return bool(one == other) if isinstance(one, (bool, int, float, str, torch.dtype, torch.device)) else True


def _differing(block: nn.Module, first: Call, second: Call) -> str | None:
    """Name of an argument that differs between two calls of a block; None if none does."""
    names = list(inspect.signature(type(block).forward).parameters)[2:]  # after self and hidden states
    for name, one, other in zip(names, first[0], second[0], strict=False):
        if not _same(one, other):
            return name
    return next((name for name, value in first[1].items() if not _same(value, second[1].get(name))), None)


def _shared(value: Any, known: list[Tensor]) -> Any:
    """The value with tensors replaced by those of the same values that are known already, so that each is kept once."""
    if isinstance(value, Tensor):
        if (found := next((tensor for tensor in known if _same(tensor, value)), None)) is None:
            known.append(value)
            return value
        return found
    if isinstance(value, (tuple, list)):
        return type(value)(_shared(v, known) for v in value)
    if isinstance(value, dict):
        return {k: _shared(v, known) for k, v in value.items()}
    return value
