"""The linear that is calibrated: a frozen float weight and a slice scheme."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobiq_lightning.kernels import mixed_depth_product
from mobiq_lightning.nn.borrowed import Borrowed
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
            y = F.linear(routed.read(x), self.scheme.weight_at(self.sliced_weight(), reading.n_slices).to(x.dtype))
        elif torch.is_grad_enabled():
            slices = self.scheme(self.sliced_weight()).to(x.dtype)
            y = F.linear(routed.gated(x), slices.transpose(0, 1).flatten(1))
        else:  # the way of ElasticLinear, so that the saved model computes what the calibrated one did, bit by bit
            weights = dict(zip(routed.depths, self.scheme.prefixes(self.sliced_weight()), strict=True))
            bits = routed.bits_of(routed.gates(x)).long().flatten()
            y = mixed_depth_product(routed.read(x).flatten(0, -2), bits, weights.__getitem__, self.out_features)
            y = y.unflatten(0, x.shape[:-1])
        bias = self.sliced_bias()
        return y if bias is None else y + bias

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
