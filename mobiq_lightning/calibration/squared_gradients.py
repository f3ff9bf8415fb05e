"""Layer gains by squared gradients: one way through the model and one way back, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.calibration.block_caller import BlockCaller
from mobiq_lightning.calibration.kept_gains import KeptGains
from mobiq_lightning.nn import RoutedInput, SlicedLinear, full_precision

Readers = Sequence[tuple[RoutedInput, Sequence[SlicedLinear]]]
"""The inputs of a block, each with the linears that read it."""
_PER_BLOCK, _IN_FRONT = "gains.", "in_front_of."
"""How tensors are named that are kept: gains of a block, and the gradients in front of the last block that is done."""


def gradient_gains(
    caller: BlockCaller,
    blocks: Sequence[Readers],
    input_ids: Tensor,
    kept: KeptGains | None = None,
    step: Callable[[int], None] = lambda _: None,
    n_tokens: int | None = None,
    summed: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """Estimates to second order by how much each slice lowers the KL divergence to full precision, weights one by one.

    ``KL = 1/2 sum_w F_w (W_k - W)_w^2`` with F the mean over tokens of the squared gradient of the negative log-likelihood at
    full precision (an empirical Fisher diagonal; the gradients of the tokens of one window are summed before they are
    squared). Biases that a transform changes are left out.

    Windows pass through all blocks once; then gradients come back through them, each block being run again for them. Only one
    block, and the squares of its gradients, are on the device.

    Args:
        caller: Calls the blocks of the model.
        blocks: Inputs of each block with their linears, I inputs in all.
        input_ids: (N, T) windows, of this process.
        kept: What an earlier process has measured, and where this one leaves what it measures, block by block.
        step: Function that is told how many passes of the windows through a block, or ways back, are done by now, of
            ``4 * len(blocks)``: a way back counts as three.
        n_tokens: Predicted tokens of all processes; by default those of `input_ids`.
        summed: Sums squares over all processes.

    Returns:
        (I, S - 1) float64 on the host, nats per token.
    """
    kept = kept or KeptGains(None, {})
    found, count = kept.tensors, len(blocks)
    first = min((int(n.removeprefix(_PER_BLOCK)) for n in found if n.startswith(_PER_BLOCK)), default=count)
    tokens = input_ids.shape[0] * (input_ids.shape[1] - 1) if n_tokens is None else n_tokens
    with full_precision([routed for block in blocks for routed, _ in block]):
        if first == count:
            tables = _on_the_way(caller, input_ids, count, step)
            behind = _from_the_head(caller, input_ids, tables.pop())
        elif first:
            tables, behind = _on_the_way(caller, input_ids, first - 1, step), found[f"{_IN_FRONT}{first}"]
        for index in reversed(range(first)):
            squares, behind = _back_through(caller, index, blocks[index], tables.pop(), behind)
            gains = _gains_of(blocks[index], [summed(square) / tokens for square in squares])
            found.pop(f"{_IN_FRONT}{index + 1}", None)
            found[f"{_PER_BLOCK}{index}"], found[f"{_IN_FRONT}{index}"] = gains, behind
            kept.save()
            step(count + 3 * (count - index))
    return torch.cat([found[f"{_PER_BLOCK}{index}"] for index in range(count)])


@torch.no_grad()
def _on_the_way(caller: BlockCaller, input_ids: Tensor, n_blocks: int, step: Callable[[int], None]) -> list[Tensor]:
    """Tables (N, T, H) on the host of what is in front of each of the first blocks, and behind the last of `n_blocks`."""
    tables = [caller.embed_all(input_ids).cpu()]
    for index in range(n_blocks):
        tables.append(torch.cat([caller.call(index, window).cpu() for window in tables[-1].split(1)]))
        step(index + 1)
    return tables


def _from_the_head(caller: BlockCaller, input_ids: Tensor, hidden: Tensor) -> Tensor:
    """Gradients (N, T, H) on the host of the summed negative log-likelihood of each window, behind the last block."""
    gradients = []
    with caller.after_blocks() as logits_of, torch.enable_grad():
        for ids, window in zip(input_ids.split(1), hidden.split(1), strict=True):
            window = window.to(caller.device).requires_grad_(True)
            logits = logits_of(ids, window)[0, :-1].float()
            loss = F.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum")
            gradients.append(torch.autograd.grad(loss, window)[0].cpu())
    return torch.cat(gradients)


def _back_through(
    caller: BlockCaller, index: int, block: Readers, hidden: Tensor, behind: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Squared gradients of the weights of a block, summed over windows, and the gradients (N, T, H) in front of it.

    Args:
        caller: Calls the block.
        index: Number of the block, from 0.
        block: Its inputs with their linears.
        hidden: (N, T, H) what is in front of it.
        behind: (N, T, H) the gradients behind it.
    """
    caller.bring(index)
    weights = [linear.weight for _, linears in block for linear in linears]
    squares = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    in_front = torch.empty_like(hidden)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for row in range(hidden.shape[0]):
            with torch.enable_grad():
                window = hidden[row : row + 1].to(caller.device).requires_grad_(True)
                output = caller.call(index, window)
                gradient = behind[row : row + 1].to(output.device, output.dtype)
                found = torch.autograd.grad(output, [window, *weights], gradient, allow_unused=True)
            in_front[row] = found[0][0]
            for square, of_weight in zip(squares, found[1:], strict=True):
                if of_weight is not None:  # experts that no token went to
                    square += of_weight.float().square()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return squares, in_front


def _gains_of(block: Readers, fisher: Sequence[Tensor]) -> Tensor:
    """Estimated gains (inputs, S - 1) of the slices of a block, float64 on the host, from the mean squares of its weights."""
    left = iter(fisher)
    gains = [[_second_order(linear, next(left)) for linear in linears] for _, linears in block]
    return torch.stack([torch.stack(of_input).sum(0) for of_input in gains])


@torch.no_grad()
def _second_order(linear: SlicedLinear, fisher: Tensor) -> Tensor:
    """Estimated gains (S - 1,) of the slices of one linear, float64 on the host."""
    weight = linear.weight.float()
    errors = torch.stack(
        [(fisher * (prefix - weight).square()).double().sum() for prefix in linear.prefixes_on_input()]
    )
    return (errors[:-1] - errors[1:]).cpu() / 2
