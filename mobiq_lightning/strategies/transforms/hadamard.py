"""Rotations of the residual stream and of the values inside heads, folded into the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mobiq_lightning.strategies.transform_base import Transform
from mobiq_lightning.strategies.transforms.residual_stream import READERS, WRITERS, ResidualStream

_ROWS = 4096  # of a matrix that are rotated at once: in float64 a whole embedding would need 8 bytes for every entry


class HadamardRotation(Transform):
    """Orthonormal Hadamard rotations with random signs, which spread outlier channels over all channels.

    These are the rotations of QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406) that can be folded into
    weights. The residual stream is rotated by R, after the weights of the RMS norms, which would not commute with it,
    have been folded into what reads them. The values inside every head are rotated by another rotation, between
    `v_proj` and `o_proj`. With ``W`` a weight (O, I) and ``g`` the weight of the norm in front::

        reads the stream (q, k, v, gate, up, output head):  W diag(g) R
        writes it (o, down; embedding):                     R^T W;  E R

    The rotations cost nothing at run time. A rotation is ``diag(signs) H``, H block-diagonal of the largest power of
    two that divides the width. Everything is computed in float64 and rounded once to the dtype of the weight. Tied
    embeddings become two matrices. Models that are not built like LLaMA are refused.

    Args:
        seed: Seed of the random signs.

    Example:
        ``transform: {class_path: HadamardRotation, init_args: {seed: 0}}``
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @torch.no_grad()
    def change_model(self, model: Any, blocks: nn.ModuleList) -> dict[str, Any]:
        """Rotates the weights of the source model in place.

        Args:
            model: The causal language model, of transformers, on the host.
            blocks: Decoder blocks of the model.

        Returns:
            ``{"tie_word_embeddings": False}`` if the embeddings were tied, else nothing.

        Raises:
            ModelError: If the model has parts that cannot be rotated with the rest; it is then unchanged.
        """
        stream = ResidualStream(model, blocks)
        generator = torch.Generator().manual_seed(self.seed)
        signs = random_signs(stream.width, generator)
        tied = stream.head.weight is stream.embedding.weight
        head = _rotated_rows(stream.head.weight, signs, stream.final_norm.weight)
        stream.embedding.weight.data = _rotated_rows(stream.embedding.weight, signs)
        stream.head.weight = nn.Parameter(head, requires_grad=False)
        stream.final_norm.weight.fill_(1)
        for block in blocks:
            _rotate_block(block, signs, generator)
        if not tied:
            return {}
        model.config.tie_word_embeddings = False
        return {"tie_word_embeddings": False}


def random_signs(width: int, generator: torch.Generator) -> Tensor:
    """Draws random signs: (width,) float64 of -1 and 1."""
    return torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """Rotates each piece of `x` (..., n * width) as wide as `signs` (width,), by fast Walsh-Hadamard transforms."""
    width = len(signs)
    block = width & -width  # the largest power of two that divides it
    y = (x.unflatten(-1, (-1, width)) * signs).unflatten(-1, (-1, block))
    step = 1
    while step < block:
        upper, lower = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack([upper + lower, upper - lower], dim=-2).flatten(-3)
        step *= 2
    result: Tensor = (y / block**0.5).flatten(-3)
    return result


def _rotate_block(block: Any, signs: Tensor, generator: torch.Generator) -> None:
    for norm_name, readers in READERS.items():
        norm = block.get_submodule(norm_name)
        for name in readers:
            linear = block.get_submodule(name)
            linear.weight.data = _rotated_rows(linear.weight, signs, norm.weight)
        norm.weight.fill_(1)
    in_head = random_signs(block.self_attn.head_dim, generator)
    _rotate_outputs(block.self_attn.v_proj, in_head)
    output = block.self_attn.o_proj
    output.weight.data = _rotated_rows(output.weight, in_head)
    for name in WRITERS:
        _rotate_outputs(block.get_submodule(name), signs)


def _rotated_rows(weight: Tensor, signs: Tensor, norm: Tensor | None = None) -> Tensor:
    """W R, or W diag(norm) R, in the dtype of the weight (O, I)."""
    scale = torch.ones((), dtype=torch.float64) if norm is None else norm.double()
    return torch.cat([rotate(rows.double() * scale, signs).to(weight.dtype) for rows in weight.split(_ROWS)])


def _rotate_outputs(linear: nn.Linear, signs: Tensor) -> None:
    """Rotates the output of a linear, in place: its weight becomes R^T W and its bias R^T b."""
    linear.weight.data = rotate(linear.weight.double().T, signs).T.to(linear.weight.dtype).contiguous()
    if linear.bias is not None:
        linear.bias.data = rotate(linear.bias.double(), signs).to(linear.bias.dtype)
