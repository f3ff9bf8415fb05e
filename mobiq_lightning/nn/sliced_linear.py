"""The linear that is calibrated: a frozen float weight and a slice scheme."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobiq_lightning.kernels import mixed_depth_product
from mobiq_lightning.nn.borrowed import Borrowed
from mobiq_lightning.nn.kept_weights import KeptWeights
from mobiq_lightning.nn.reading import FixedSlices, FullPrecision
from mobiq_lightning.nn.routed_input import RoutedInput
from mobiq_lightning.strategies.base import SliceScheme


class SlicedLinear(nn.Module):
    """A frozen linear whose weight is sliced on the fly: the form that is calibrated.

    The scheme and the routed input are not registered here: they are trained, kept on the trainer's device and saved by
    their own owner, while the frozen weights come and go with their block.

    Args:
        linear: The source layer; its weight and bias are taken over, not copied.
        scheme: Slice scheme that cuts the weight into slices.
        routed: Routed input that this layer reads.
    """

    def __init__(self, linear: nn.Linear, scheme: SliceScheme, routed: RoutedInput) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._scheme, self._routed = Borrowed(scheme), Borrowed(routed)
        self.kept: KeptWeights | None = None
        """Where weights are kept while nothing changes them, see `keeping_weights`."""

    @property
    def scheme(self) -> SliceScheme:
        """Slice scheme that cuts the weight into slices."""
        return self._scheme.value

    @property
    def routed(self) -> RoutedInput:
        """Routed input that this layer reads, which other linears may share."""
        return self._routed.value

    def slice_by(self, scheme: SliceScheme) -> None:
        """Slices the weight by another scheme from now on."""
        self._scheme = Borrowed(scheme)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies tokens `x` (..., I) by the weight, as deep as each is to read it: (..., O) in the dtype of `x`."""
        routed, reading = self.routed, self.routed.reading
        if isinstance(reading, FullPrecision):
            return F.linear(x, self.weight, self.bias)
        if isinstance(reading, FixedSlices):
            y = F.linear(routed.read(x), self._weight_read(reading.n_slices, x.dtype))
        elif torch.is_grad_enabled():
            y = F.linear(routed.gated(x), self._side_by_side(x.dtype))
        else:  # the way of ElasticLinear, so that the saved model computes what the calibrated one did, bit by bit
            bits = routed.bits_of(routed.gates(x)).long().flatten()
            y = mixed_depth_product(routed.read(x).flatten(0, -2), bits, self._by_depth(), self.out_features)
            y = y.unflatten(0, x.shape[:-1])
        bias = self.sliced_bias()
        return y if bias is None else y + bias

    def _weight_read(self, n_slices: int, dtype: torch.dtype) -> Tensor:
        """Weight (O, I) read with the first `n_slices` slices."""

        def make() -> Tensor:
            return self.scheme.weight_at(self.sliced_weight(), n_slices).to(dtype)

        return make() if self.kept is None else self.kept.get((id(self), n_slices, dtype), make)

    def _side_by_side(self, dtype: torch.dtype) -> Tensor:
        """All slices beside each other, (O, S * I)."""

        def make() -> Tensor:
            slices: Tensor = self.scheme(self.sliced_weight())
            return slices.to(dtype).transpose(0, 1).flatten(1)

        return make() if self.kept is None else self.kept.get((id(self), 0, dtype), make)

    def _by_depth(self) -> Callable[[int], Tensor]:
        """Function that gives the weight (O, I) float32 of a depth in bits."""
        depths = self.routed.depths
        if self.kept is not None:
            return lambda bits: self._weight_read(depths.index(bits) + 1, torch.float32)
        made: dict[int, Tensor] = dict(zip(depths, self.scheme.prefixes(self.sliced_weight()), strict=True))
        return made.__getitem__

    def sliced_weight(self) -> Tensor:
        """Weight (O, I) that the scheme slices: multiplied by the scale of the input's transform, if there is one."""
        transform = self.routed.transform
        return self.weight if transform is None else transform.to_weight(self.weight)

    def prefixes_on_input(self) -> Tensor:
        """Weight (S, O, I) read with 1, 2, ... slices, as it acts on the input before the transform scales it."""
        prefixes, transform = self.scheme.prefixes(self.sliced_weight()), self.routed.transform
        return prefixes if transform is None else prefixes / transform.channel_scale()

    def sliced_bias(self) -> Tensor | None:
        """Bias (O,) added to products with slices, with that of the transform's shift; None if there is none."""
        transform = self.routed.transform
        return self.bias if transform is None else transform.to_bias(self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes that `print(module)` shows of this layer."""
        return f"{self.out_features}x{self.in_features}, bias={self.bias is not None}"


@contextmanager
def keeping_weights(linears: Sequence[SlicedLinear], limit_bytes: int) -> Iterator[None]:
    """Context in which linears keep the weights that they make of their slices, since nothing changes them there.

    What is computed is the same, bit by bit, without gradients for ranges, codes and transforms.

    Args:
        linears: Linears of a model, on the device that they run on.
        limit_bytes: Bytes that the kept weights may take together; others are made for every product.
    """
    kept = KeptWeights(limit_bytes, requests_per_pass=(len(linears[0].scheme.slice_bits) + 1) * len(linears))
    before = [linear.kept for linear in linears]
    try:
        for linear in linears:
            linear.kept = kept
        yield
    finally:
        for linear, held in zip(linears, before, strict=True):
            linear.kept = held
        kept.clear()
