"""Linear layers that are read slice by slice, in two forms.

`SlicedLinear` is the form that is calibrated: a frozen float weight and a slice scheme. `ElasticLinear` is the form that
is saved and run: bit planes. Both ask the `RoutedInput` of the linears that share their input how deep each token reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobiq_lightning.errors import BitsError
from mobiq_lightning.kernels import mixed_depth_product, sliced_linear
from mobiq_lightning.nn.borrowed import Borrowed
from mobiq_lightning.nn.experts import RoutedExperts
from mobiq_lightning.nn.kept_weights import KeptWeights
from mobiq_lightning.nn.reading import FixedSlices, FullPrecision
from mobiq_lightning.nn.routed_input import RoutedInput, held_slices, without_casts
from mobiq_lightning.nn.sliced_linear import SlicedLinear
from mobiq_lightning.packing import CODES, INPUT, SCALE_DTYPE, PackedSlices, PackedWeight, plane_name

if TYPE_CHECKING:
    from mobiq_lightning.nn.fused_products import FusedProducts


class ElasticLinear(nn.Module):
    """A linear stored as bit planes: the form that is saved and run.

    Each plane is a tensor of its own, (O, ceil(I / 8)) uint8, so that loaders may shard them by rows.

    Args:
        in_features: Columns of the weight, I.
        out_features: Rows of the weight, O.
        slice_bits: Bits of each slice.
        group_size: Columns per group.
        bias: Whether the layer adds a bias.
        max_bits: Depth in bits up to which planes are held; by default all that `slice_bits` add up to.
        dtype: dtype of the bias term.
        code: Name of the code that turns stored bits into weights, one of `packing.CODES`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        slice_bits: tuple[int, ...],
        group_size: int,
        bias: bool,
        max_bits: int | None = None,
        dtype: torch.dtype | None = None,
        code: str = PackedSlices.code,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.slice_bits, self.group_size = held_slices(slice_bits, max_bits), group_size
        self.n_planes, self.code = sum(self.slice_bits), code
        row = -(-in_features // 8)
        for plane in range(self.n_planes):
            self.register_buffer(plane_name(plane), torch.zeros(out_features, row, dtype=torch.uint8))
        shapes = CODES[code].value_shapes(out_features, in_features, group_size, self.slice_bits)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=SCALE_DTYPE))
        self._value_names = tuple(shapes)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.kept: KeptWeights | None = None
        self._routed: Borrowed[RoutedInput] | None = None
        self.carries_input = False
        self.decides = True
        """Whether it asks its input how deep tokens are read, and counts them; experts do that for their linears."""
        self.own_kernel: FusedProducts[ElasticLinear] | None = None
        """Holder of the weight in the kernels' order if it is multiplied alone, as the linears of experts are."""

    @property
    def routed(self) -> RoutedInput:
        """Routed input that this layer reads, which other linears may share.

        Raises:
            RuntimeError: If `attach` has not set it yet.
        """
        if self._routed is None:
            raise RuntimeError(f"{type(self).__name__}({self.extra_repr()}) has no input; call attach(routed) first")
        return self._routed.value

    @property
    def kernel(self) -> FusedProducts[ElasticLinear] | None:
        """Holder of the weights in the kernels' order; None if the reference multiplies them."""
        if self.own_kernel is not None:
            return self.own_kernel
        return None if self._routed is None else self._routed.value.kernel

    def attach(self, routed: RoutedInput, carries_input: bool = False, decides: bool = True) -> None:
        """Sets the input of this layer.

        Args:
            routed: The input, which other linears may read as well.
            carries_input: Whether this layer, of all that read the input, holds it as a submodule, under whose name it
                is saved, and counts its tokens.
            decides: Whether it asks the input how deep tokens are read, and counts them; experts do that for their linears.
        """
        self._routed = Borrowed(routed)
        self.carries_input, self.decides = carries_input, decides
        if carries_input:
            self.add_module(INPUT, routed)

    @property
    def packed(self) -> PackedWeight:
        """Stored weight: bit planes (O, ceil(I / 8)) uint8 and the values of the code."""
        if self.kernel is not None:
            return self.kernel.packed(self)
        return CODES[self.code](
            tuple(self.get_buffer(plane_name(p)) for p in range(self.n_planes)),
            tuple(self.get_buffer(name) for name in self._value_names),
            self.in_features,
            self.group_size,
            self.slice_bits,
        )

    @property
    def n_weights(self) -> int:
        """Number of weights of the matrix, O x I."""
        return self.out_features * self.in_features

    @property
    def overhead_bits(self) -> float:
        """Bits per weight spent on the values of the code: scales and biases, or tables."""
        return sum(self.get_buffer(name).numel() for name in self._value_names) * 16 / self.n_weights

    def give_up_planes(self) -> None:
        """Drops the planes of this layer, which `RoutedInput.kernel` holds in the kernels' order from now on."""
        for plane in range(self.n_planes):
            setattr(self, plane_name(plane), None)

    def take_planes(self, planes: Sequence[Tensor]) -> None:
        """Takes the planes back that `give_up_planes` dropped, each (O, ceil(I / 8)) uint8."""
        for number, plane in enumerate(planes):
            setattr(self, plane_name(number), plane)

    def weight_at(self, n_bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Gives the weight read to a depth of `n_bits`, (O, I); it is unpacked once if memory allows to keep it."""

        def make() -> Tensor:
            return self.packed.weight_at(n_bits).to(dtype)

        return make() if self.kept is None else self.kept.get((id(self), n_bits, dtype), make)

    def multiply(self, x: Tensor, bits: Tensor) -> Tensor:
        """Multiplies tokens (T, I), each at its own depth in `bits` (T,), by the weight, on the reference: (T, O)."""
        weight_at = partial(self.weight_at, dtype=x.dtype)
        if (
            x.device.type == "cpu" and not torch.compiler.is_compiling()
        ):  # as the reference does, but planes are not gathered
            return mixed_depth_product(x, bits, weight_at, self.out_features)
        return sliced_linear(x, self.packed, bits, weight_at)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies tokens `x` (..., I) by the weight, as deep as each is to read it: (..., O) in the dtype of `x`.

        Raises:
            BitsError: If full precision is asked for, which bit planes do not hold.
        """
        routed, reading = self.routed, self.routed.reading
        if isinstance(reading, FullPrecision):
            raise BitsError(
                f"full precision was asked of {type(self).__name__}({self.extra_repr()}), which holds no full-precision "
                f"weight; ask the source model, or read {routed.depths[-1]} bits with fixed_depth"
            )
        if self.kernel is not None:
            y = self.kernel.product(x, self)
        elif isinstance(reading, FixedSlices):
            y = F.linear(routed.read(x), self.weight_at(routed.depths[reading.n_slices - 1], x.dtype))
        else:
            bits = routed.bits_of(routed.gates(x)).long()
            if self.carries_input and self.decides:  # the first of the linears that share the input
                routed.count(bits)
            product = self.multiply(routed.read(x).flatten(0, -2), bits.flatten())
            y = product.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._changes()
        moved_only = without_casts(fn)
        # Only the bias, a parameter, takes part in the computation in the model's dtype.
        return super()._apply(  # type: ignore[no-untyped-call]
            lambda t: fn(t) if isinstance(t, nn.Parameter) else moved_only(t), recurse
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            for number, plane in enumerate(self.packed.planes):
                destination[f"{prefix}{plane_name(number)}"] = plane

    def _load_from_state_dict(self, *args: Any) -> None:
        self._changes()
        super()._load_from_state_dict(*args)

    def _changes(self) -> None:
        """Drops what was made of the planes, before they are moved or replaced."""
        if self.kernel is not None:
            self.kernel.release()
        if self.kept is not None:
            self.kept.clear()

    def extra_repr(self) -> str:
        """Sizes that `print(module)` shows of this layer."""
        bits, code = list(self.slice_bits), "" if self.code == PackedSlices.code else f", {self.code} code"
        size = f"{self.out_features}x{self.in_features}, {bits} bits, {self.n_planes} planes"
        return f"{size}, groups of {self.group_size}{code}"


def routed_inputs(model: nn.Module) -> list[RoutedInput]:
    """Routed inputs that the sliced or elastic linears of a model read, in the order of its modules, each once."""
    found: dict[int, RoutedInput] = {}
    for module in model.modules():
        if isinstance(module, (SlicedLinear, ElasticLinear)):
            found.setdefault(id(module.routed), module.routed)
    return list(found.values())


def product_groups(model: nn.Module) -> list[list[tuple[str, ElasticLinear]]]:
    """Elastic linears of a model with their names, those together that are multiplied at once.

    These are the linears that read an input; of experts, each linear is multiplied with tokens of its own.
    """
    experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    alone = {id(linear) for of_block in experts for linear in of_block.linears()}
    groups: dict[int, list[tuple[str, ElasticLinear]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ElasticLinear):
            groups.setdefault(id(module) if id(module) in alone else id(module.routed), []).append((name, module))
    return list(groups.values())


def input_names(model: nn.Module) -> list[str]:
    """Names of the routed inputs of a model, in the order of `routed_inputs`: the dotted path of the linear carrying each."""
    return [
        name for name, module in model.named_modules() if isinstance(module, ElasticLinear) and module.carries_input
    ]
