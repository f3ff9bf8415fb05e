"""An input of a model whose linears are multiplied by the Triton kernels: one launch to route, one to multiply.

The linears that share an input (q, k and v; gate and up) hold their weights together, in the kernels' order, in place of the
bit planes; whoever moves or saves the model gets the planes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mobiq_lightning.errors import KernelError
from mobiq_lightning.kernels import missing_for_code, missing_for_kernels, relay, restore
from mobiq_lightning.kernels.layout import KernelWeights
from mobiq_lightning.kernels.routing import MAX_ROUTED, Routing, TwoLayerWeights, relay_router
from mobiq_lightning.nn import ElasticLinear, FixedSlices, RoutedInput, product_groups
from mobiq_lightning.packing import PackedSlices, value_name
from mobiq_lightning.strategies.base import Router
from mobiq_lightning.tensor_memo import TensorMemo

if TYPE_CHECKING:
    from mobiq_lightning.kernels.form import Prepared


class KernelInput:
    """One routed input and the linears that read it, in the kernels' order.

    Args:
        routed: Routed input that the linears share.
        linears: Linears that read the input, in the order of the model. They give up their planes.
        decides: Whether it is asked how deep tokens are read, and counts them; a linear of an expert is multiplied alone, at
            depths that are decided for all experts at once.
    """

    def __init__(self, routed: RoutedInput, linears: list[ElasticLinear], decides: bool = True) -> None:
        self.routed, self.linears, self.decides = routed, linears, decides
        self.weights: KernelWeights = relay([linear.packed for linear in linears])
        self.router = None
        # A router reads what is in front of the transform, so the two are run in front of the kernels.
        if decides and routed.transform is None and (two_layers := fusable_router(routed.router)):
            self.router = relay_router(two_layers, self.weights)
        self.counted = torch.ones(MAX_ROUTED, dtype=torch.int64, device=self.weights.units.device)
        self._entered: TensorMemo[Prepared] = TensorMemo()
        self._product: TensorMemo[Tensor] = TensorMemo()
        self._waiting = 0
        if decides:
            routed.kernel = self
        for linear in linears:
            linear.give_up_planes()
            if not decides:
                linear.own_kernel = self

    def release(self) -> None:
        """Gives the planes back to the linears, which then are multiplied by the reference."""
        packed = [restore(self.weights, index) for index in range(len(self.linears))]
        if self.decides:
            self.routed.kernel = None
        for linear, weights in zip(self.linears, packed, strict=True):
            linear.own_kernel = None
            linear.take_planes(weights.planes)

    def forget(self) -> None:
        """Drops what is kept for the last tensor, for when tokens are to be read in another way."""
        self._entered.forget()
        self._product.forget()

    def packed(self, linear: ElasticLinear) -> PackedSlices:
        """Gives the saved form, bit planes with scales and biases, of one of the linears."""
        return restore(self.weights, self.linears.index(linear))

    def product(self, x: Tensor, linear: ElasticLinear) -> Tensor:
        """Multiplies tokens by the weight of one of the linears, without adding its bias.

        Args:
            x: (..., I) tokens; the same tensor for all linears, which are multiplied when the first of them asks.
            linear: Linear whose product is asked for.

        Returns:
            (..., O), a view of the product of all linears.

        Raises:
            KernelError: If gradients are asked for, which the kernels do not give.
        """
        index = self.linears.index(linear)
        if torch.compiler.is_compiling():
            return self._compiled(x, index)
        if torch.is_grad_enabled() and x.requires_grad:
            raise KernelError(
                "gradients were asked for, which the kernels do not give; use torch.no_grad(), or model.switch_kernels(False)"
            )
        y = self._product.get(x, lambda: self._product_of_all(x))
        self._waiting -= 1
        if not self._waiting:  # every linear has asked; if one of them is called twice, all are multiplied once more
            self._product.forget()
        start = self.weights.row_starts[index]
        mine: Tensor = y[:, start : start + linear.out_features].unflatten(0, x.shape[:-1])
        return mine

    def routes(self, x: Tensor) -> bool:
        """Tells whether the launch that prepares the tokens `x` (..., I) can decide their depths too.

        The launch can if tokens are few, their router is one that the kernels know, they are read to its own threshold,
        and nobody observes what it decides.
        """
        if torch.compiler.is_compiling():  # first: the rest is no work for a compiler
            return False
        tokens = x.numel() // x.shape[-1]
        return (
            self.router is not None
            and 0 < tokens <= MAX_ROUTED
            and self.routed.reads_plainly
            and not (torch.is_grad_enabled() and x.requires_grad)
        )

    def enter(self, x: Tensor, norm: tuple[Tensor, float] | None = None, up: Tensor | None = None) -> Tensor:
        """Applies norm or gating, routes and prepares tokens in one launch, before the linears ask for them.

        Args:
            x: (..., I) tokens in front of the norm or the gating, for which `routes` holds.
            norm: Weight (I,) and epsilon of an RMS norm; None if there is none.
            up: (..., I) second factor of the gating ``silu(x) * up``; None if there is none.

        Returns:
            Input (..., I) of the linears, which must be given to them as this very tensor.
        """
        from mobiq_lightning.kernels.dispatch import route_and_prepare

        flat = x.flatten(0, -2)
        y, prepared = route_and_prepare(
            flat, self.weights, self._routing(x), norm, None if up is None else up.flatten(0, -2)
        )
        y = y.view(x.shape)
        self._entered.keep(y, prepared)
        return y

    def _product_of_all(self, x: Tensor) -> Tensor:
        self._waiting = len(self.linears)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        from mobiq_lightning.kernels.dispatch import multiply, multiply_uniform, route_and_prepare

        routed = self.routed
        flat = routed.read(x).flatten(0, -2)
        if isinstance(routed.reading, FixedSlices):
            return multiply_uniform(flat, self.weights, routed.depths[routed.reading.n_slices - 1])
        prepared = self._entered.take(x)
        if prepared is None and self.routes(x):
            prepared = route_and_prepare(flat, self.weights, self._routing(x))[1]
        if prepared is not None:
            return multiply(flat, self.weights, prepared.bits, prepared=prepared)
        bits = routed.bits_of(routed.gates(x)).long()
        if self.decides:
            routed.count(bits)
        return multiply(flat, self.weights, bits.flatten())

    def _routing(self, x: Tensor) -> Routing:
        routed, router = self.routed, self.router
        assert router is not None
        threshold, mask = routed.router.threshold, routed.state.mask
        if routed.state.per_row:
            routed.check_rows(x)
        tokens = x.numel() // x.shape[-1]
        valid = self.counted
        if mask is not None and mask.numel() == tokens:
            valid = mask.reshape(-1).to(torch.int64)
        return Routing(router, threshold.reshape(-1), routed.bits_read, routed.tokens_read, valid)

    def _compiled(self, x: Tensor, index: int) -> Tensor:
        """Product (..., O) of one linear while a graph is compiled; the compiler merges what linears have in common."""
        from mobiq_lightning.kernels.dispatch import kernel_linear

        routed, weights = self.routed, self.weights
        if isinstance(routed.reading, FixedSlices):
            depth = routed.depths[routed.reading.n_slices - 1]
            bits = torch.full(x.shape[:-1], depth, dtype=torch.int64, device=x.device)
        else:
            bits = routed.bits_of(routed.gates(x)).long()
            if index == 0:
                routed.count(bits)
        flat: Tensor = kernel_linear(
            routed.read(x).flatten(0, -2),
            weights.units,
            weights.meta,
            weights.counters,
            bits.flatten(),
            weights.out_features,
            weights.in_features,
            weights.group_size,
            weights.slice_bits,
            index,
        )
        y: Tensor = flat.unflatten(0, x.shape[:-1])
        return y


def fusable_router(router: Router) -> TwoLayerWeights | None:
    """Gives the weights of a router that the kernels can run; None for any other.

    The router's class must define `two_layers` together with the scores that it describes, and leave gates as they are.
    """
    # `two_layers` describes the scores of the class that defines it. A subclass that overrides the scores alone inherits
    # a description that is not true of it.
    owner: Any = next(cls for cls in type(router).__mro__ if "two_layers" in vars(cls))
    layers = router.two_layers()
    if layers is None or type(router).scores is not owner.scores or type(router).gates is not Router.gates:
        return None
    return TwoLayerWeights(*layers)


def attach_kernels(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Brings the weights of all elastic linears of a model into the kernels' order.

    Args:
        model: Model on the device that it will run on.
        dtype: dtype that the model computes in.

    Returns:
        Reason why the kernels cannot run, in which case nothing was changed; None if they are attached.
    """
    groups = [[linear for _, linear in named] for named in product_groups(model)]
    for linears in groups:
        for linear in linears:
            if reason := _missing(linear, dtype):
                return reason
    for linears in groups:
        if linears[0].kernel is None:
            KernelInput(linears[0].routed, linears, decides=linears[0].decides)
    return None


def detach_kernels(model: nn.Module) -> None:
    """Gives all elastic linears of a model their planes back, so that the reference multiplies them."""
    for module in model.modules():
        if isinstance(module, (RoutedInput, ElasticLinear)) and module.kernel is not None:
            module.kernel.release()


def _missing(linear: ElasticLinear, dtype: torch.dtype) -> str | None:
    from importlib.util import find_spec

    if reason := missing_for_code(linear.code):
        return reason
    device = linear.get_buffer(value_name("scale")).device
    if find_spec("triton") is not None:
        from mobiq_lightning.kernels.dispatch import INTERPRETED

        if INTERPRETED:
            return (
                None if dtype == torch.float32 else f"Triton's interpreter takes float32, the model computes in {dtype}"
            )
    return missing_for_kernels(device, dtype)
