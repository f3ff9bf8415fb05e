"""Measures how far the linears of each input are off for each token, at each precision, on full-precision inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobiq_lightning.nn import ElasticLinear, product_groups


class InputErrors:
    """Watches a full-precision model and computes what an elastic one would make of the inputs of its linears.

    Linears of experts, each of which sees some of the tokens, are left out.

    Args:
        full: The source model.
        elastic: An elastic model made of it, whose linears have the same names.
        bits: The P precisions, as depths in bits.
    """

    def __init__(self, full: nn.Module, elastic: nn.Module, bits: Sequence[int]) -> None:
        self.bits = tuple(bits)
        linears: dict[str, list[tuple[Any, ElasticLinear]]] = {
            named[0][0]: [(full.get_submodule(name), linear) for name, linear in named]
            for named in product_groups(elastic)
            if named[0][1].decides
        }
        # Linears of a rotated model read other inputs than those of the source: there is nothing to compare them on.
        alike = all(_same_basis(*pair) for pairs in linears.values() for pair in pairs)
        self.linears = linears if alike else {}
        self._found: dict[str, list[Tensor]] = {name: [] for name in self.linears}

    @contextmanager
    def watch(self, counted: Tensor) -> Iterator[None]:
        """A context in which forward passes of the full-precision model are watched and their errors noted.

        Args:
            counted: (B, T - 1) bool, which tokens of each window count; the last one never does.
        """
        handles = [
            linears[0][0].register_forward_pre_hook(partial(self._note, name, counted))
            for name, linears in self.linears.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def errors(self) -> dict[str, Tensor]:
        """By the first linear of each input, the relative errors (P, N) of the N tokens that were watched.

        It is empty if the elastic model's weights were rotated, since its inputs then differ from the source's.
        """
        return {name: torch.cat(found, dim=1) for name, found in self._found.items()}

    def _note(self, name: str, counted: Tensor, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows, after = counted.shape
        x = args[0].reshape(rows, after + 1, -1)[:, :-1][counted].float()  # blocks with experts flatten their tokens
        weight = torch.cat([source.weight for source, _ in self.linears[name]]).float()
        elastic = [linear for _, linear in self.linears[name]]  # on the host where one block is on the device at a time
        read = (torch.cat([_read_on_input(linear, b) for linear in elastic]).to(x.device) for b in self.bits)
        transform = elastic[0].routed.transform
        shift = None if transform is None else transform.channel_shift()  # what it takes off the bias adds exactly
        self._found[name].append(relative_errors(x, weight, read, x if shift is None else x - shift.to(x.device)).cpu())


def relative_errors(x: Tensor, weight: Tensor, read: Iterator[Tensor], shifted: Tensor) -> Tensor:
    """Relative squared error ``|(W - W_b) (x - d)|^2 / |W x|^2`` of the outputs of each token.

    Args:
        x: (N, I) tokens.
        weight: (O, I) weight W in full precision, all linears of the input below each other.
        read: Yields the weight W_b (O, I) as it is read at each of the P precisions.
        shifted: (N, I) tokens x - d that sliced weights are multiplied with: x minus the shift d of a transform.

    Returns:
        (P, N) errors.
    """
    size = F.linear(x, weight).square().sum(-1).clamp_min(1e-30)
    # The difference of the weights, not of the products: at 8 bits those would agree to all digits that they have.
    return torch.stack([F.linear(shifted, weight - at).square().sum(-1) / size for at in read])


def _same_basis(source: Any, elastic: ElasticLinear) -> bool:
    """Whether the weight of an elastic linear, as deep as it is held, is that of the source with an error, or another one.

    Two unrelated weights of one size differ by twice their squared norm; the coarsest codes by less than a fifth of it.
    """
    weight = source.weight.float()
    off = (weight - _read_on_input(elastic, elastic.n_planes)).square().sum() / weight.square().sum().clamp_min(1e-30)
    return bool(off < 0.5)


def _read_on_input(elastic: ElasticLinear, n_bits: int) -> Tensor:
    """The weight (O, I) float32 read to `n_bits`, as it acts on the input before a transform scales it."""
    weight, transform = elastic.weight_at(n_bits), elastic.routed.transform
    return weight if transform is None else weight / transform.channel_scale()
