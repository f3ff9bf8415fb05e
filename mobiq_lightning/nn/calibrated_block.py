"""What is learned of one decoder block: schemes, routers and transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from mobiq_lightning.nn.borrowed import Borrowed
from mobiq_lightning.nn.open_experts import experts_of, read_share
from mobiq_lightning.nn.routed_input import RoutedInput
from mobiq_lightning.nn.shared_input import make_shared_input
from mobiq_lightning.nn.sliced_linear import SlicedLinear
from mobiq_lightning.strategies import ObservesWeights, TrainableCodes
from mobiq_lightning.strategies.base import Router, SliceScheme
from mobiq_lightning.strategies.transform_base import InputTransform, Transform

SliceFactory = Callable[[int, int], SliceScheme]


RouterFactory = Callable[[int, int], Router]


Learned = Literal["ranges", "codes", "transforms", "routers"]
"""The kinds of things that a calibration learns."""


class CalibratedBlock(nn.Module):
    """What is learned of one decoder block: the schemes of its linears, the routers and transforms of its inputs.

    Args:
        block: The decoder block; its linears are replaced by `SlicedLinear`.
        groups: Names of the linears of each input.
        slices: Factory that makes the scheme of a linear from (out_features, in_features).
        router: Factory that makes the router of an input from (in_features, n_slices).
        transform: Transform that makes what is learned of inputs beside routers; by default there is none.
    """

    def __init__(
        self,
        block: nn.Module,
        groups: Sequence[Sequence[str]],
        slices: SliceFactory,
        router: RouterFactory,
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        self.schemes = nn.ModuleDict()
        self.inputs = nn.ModuleDict()
        readers: list[tuple[RoutedInput, list[SlicedLinear]]] = []
        entries: list[nn.Module] = []
        for names in groups:
            linears: list[Any] = [block.get_submodule(name) for name in names]
            schemes = [slices(linear.out_features, linear.in_features) for linear in linears]
            slice_bits = schemes[0].slice_bits
            of_input = (transform or Transform()).for_input
            routed = make_shared_input(linears, slice_bits, router, of_input, read=read_share(block, names[0]))
            self.inputs[_key(names[0])] = routed
            sliced: list[SlicedLinear] = []
            readers.append((routed, sliced))
            for name, linear, scheme in zip(names, linears, schemes, strict=True):
                self.schemes[_key(name)] = scheme
                sliced.append(SlicedLinear(linear, scheme, routed))
                block.set_submodule(name, sliced[-1])
            experts = experts_of(block, names[0])
            entries.append(sliced[0] if experts is None else block.get_submodule(f"{experts}.entry"))
        self._readers, self._entries = Borrowed(readers), Borrowed(entries)  # they belong to the decoder block

    @property
    def readers(self) -> list[tuple[RoutedInput, list[SlicedLinear]]]:
        """Each input of this block, in order, with the linears that read it."""
        return self._readers.value

    @property
    def entries(self) -> list[nn.Module]:
        """For each input of this block, in order, the module that is given all its tokens: a linear, or the entry of experts."""
        return self._entries.value

    def routed_inputs(self) -> list[RoutedInput]:
        """Routed inputs of this block, in the order of its modules."""
        return [module for module in self.inputs.values() if isinstance(module, RoutedInput)]

    @torch.no_grad()
    def show_weights_to_routers(self) -> None:
        """Shows each router that observes weights the full-precision weights and what their slices give at present."""
        for routed, readers in self.readers:
            if isinstance(routed.router, ObservesWeights):
                reading = [linear for linear in readers if linear.in_features == readers[0].in_features]
                weights = [linear.weight.float() for linear in reading]
                prefixes = [linear.prefixes_on_input() for linear in reading]
                routed.router.observe_weights(
                    torch.cat(weights), torch.cat(prefixes, dim=1), readers[0].scheme.slice_bits
                )

    def routers(self) -> list[Router]:
        """Routers of the inputs of this block, in the order of the inputs."""
        return [routed.router for routed in self.routed_inputs()]

    def transforms(self) -> list[InputTransform]:
        """Transforms of those inputs of this block that have one, in the order of the inputs."""
        return [routed.transform for routed in self.routed_inputs() if routed.transform is not None]

    def sliced_linears(self) -> list[SlicedLinear]:
        """Linears of this block, in the order of their inputs."""
        return [linear for _, readers in self.readers for linear in readers]

    def parameters_of(self, kind: Learned) -> list[nn.Parameter]:
        """Parameters of one kind in this block: ranges or codes of schemes, those of transforms, or of routers."""
        codes = [p for linear in self.sliced_linears() for p in _codes_of(linear.scheme)]
        if kind == "codes":
            return codes
        modules = {"ranges": self.schemes.values(), "transforms": self.transforms(), "routers": self.routers()}[kind]
        known = {id(parameter) for parameter in codes}
        return [p for module in modules for p in module.parameters() if id(p) not in known]


def _codes_of(scheme: SliceScheme) -> list[nn.Parameter]:
    return scheme.code_parameters() if isinstance(scheme, TrainableCodes) else []


def _key(name: str) -> str:
    return name.replace(".", "-")  # keys of a ModuleDict must not contain dots
