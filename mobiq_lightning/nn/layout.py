"""Where the decoder blocks of a model are, which of their linears are sliced, and which of them read the same input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import nn

from mobiq_lightning.errors import ModelError
from mobiq_lightning.nn.open_experts import experts_of, is_gating, open_block, unknown_stacks
from mobiq_lightning.nn.sliced_linear import SlicedLinear

Share = Literal["input", "linear"]
_USUAL = "model.layers"
_UNKNOWN_SHARE = 0.01
"""Part of the numbers of a block from which on stacks of matrices of an unknown form are refused."""


@dataclass
class BlockLayout:
    """Where the decoder blocks of a model are, which of their linears are sliced, and which read the same input.

    Args:
        blocks: Dotted path of the list of decoder blocks. Models that have none at `model.layers` are asked which of their
            modules are decoder blocks, so that it need not be given for the families that transformers knows.
        shared_inputs: Groups of linears, by the last part of their name, that read one input. Every other linear has an
            input of its own.
        experts: Whether experts of blocks that have some are sliced; else they stay in full precision.
    """

    blocks: str = _USUAL
    shared_inputs: list[list[str]] = field(
        default_factory=lambda: [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    )
    experts: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.experts, bool):  # None would leave them in full precision
            raise ValueError(f"model.layout.experts ({self.experts!r}) must be true or false")

    def open(self, model: nn.Module, compare: bool = True) -> None:
        """Prepares a model for being sliced: finds its blocks, and makes linears of their experts, in place.

        Args:
            model: The causal language model; it computes what it did before.
            compare: Whether that is made sure of where it has experts.

        Raises:
            ModelError: If there are no blocks, or they have experts of a form that is not known.
        """
        self.blocks = self._path(model)
        for number, block in enumerate(self.find(model) if self.experts else []):
            compare &= not open_block(block, compare)  # one block that has some stands for all
            total = sum(p.numel() for p in block.parameters())
            unknown = {name: p for name, p in unknown_stacks(block) if p.numel() > _UNKNOWN_SHARE * total}
            if unknown:
                share = sum(p.numel() for p in unknown.values()) / total
                raise ModelError(
                    f"model.pretrained: {type(model).__name__} holds {share:.0%} of the weights of block {number + 1} in a form "
                    f"that cannot be sliced ({', '.join(f'{n} {tuple(p.shape)}' for n, p in unknown.items())}); this family is "
                    "not supported. Set model.layout.experts to false to slice the rest and leave these in full precision"
                )

    def find(self, model: nn.Module) -> nn.ModuleList:
        """Finds the list of decoder blocks of a model.

        Raises:
            ModelError: If `blocks` is not the path of a list of modules, or the list is empty.
        """
        found = _at(model, self._path(model))
        assert found is not None
        return found

    def _path(self, model: nn.Module) -> str:
        """Path of the decoder blocks: the one given, or the only list of what the model itself calls decoder blocks."""
        if _at(model, self.blocks) is not None:
            return self.blocks
        lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        own = set(getattr(model, "_no_split_modules", None) or [])
        known: list[str] = [name for name, blocks in lists.items() if len(blocks) and type(blocks[0]).__name__ in own]
        if self.blocks == _USUAL and len(known) == 1:
            return known[0]
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks at {self.blocks!r}. Name the list in model.layout.blocks "
            f"(lists in this model: {', '.join(lists) or 'none'})"
        )

    def group_linears(self, block: nn.Module, share: Share) -> list[list[str]]:
        """Groups the names of the linears of a block by the router that they share, in the order of the modules.

        All linears of the experts of a block share one, whatever `share` is. What decides where tokens go is left out.

        Args:
            block: A decoder block.
            share: ``input`` if linears that read one input share a router, ``linear`` if each has its own.

        Raises:
            ModelError: If the block holds no linear.
        """
        names = [name for name, module in block.named_modules() if isinstance(module, (nn.Linear, SlicedLinear))]
        own = sorted({type(block.get_submodule(name)).__name__ for name in names})
        names = [name for name in names if not is_gating(block, name)]
        if not names:
            why = f"; what {' and '.join(own)} makes of a weight is not known" if own else ""
            raise ModelError(f"the blocks at {self.blocks!r} ({type(block).__name__}) hold no nn.Linear to slice{why}")
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            parent, _, last = name.rpartition(".")
            shared = next((tuple(g) for g in self.shared_inputs if last in g), (last,)) if share == "input" else (last,)
            experts = experts_of(block, name)
            key = (parent, *shared) if experts is None else (experts,)
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def kept(self, block: nn.Module) -> dict[str, nn.Parameter]:
        """Matrices of a block that are not sliced, by name: gates of experts, experts that are left out, and what else there is.

        Args:
            block: A decoder block, its linears sliced or not.
        """
        sliced = {f"{name}.weight" for names in self.group_linears(block, "input") for name in names}
        return {name: p for name, p in block.named_parameters() if p.ndim > 1 and name not in sliced}

    def to_stored(self, model: nn.Module) -> dict[str, Any]:
        """This layout as a checkpoint holds it: that experts are sliced is noted where there are some.

        Args:
            model: The model, which was opened.
        """
        kept = asdict(self)
        sliced = any(
            experts_of(block, names[0]) for block in self.find(model) for names in self.group_linears(block, "input")
        )
        return kept if sliced else {name: value for name, value in kept.items() if name != "experts"}


def stored_layout(stored: Mapping[str, Any]) -> BlockLayout:
    """The layout of a checkpoint; one that says nothing of experts has none, or has them in full precision.

    Args:
        stored: What `BlockLayout.to_stored` gave when it was written, or what earlier versions wrote.
    """
    return BlockLayout(**{"experts": False, **stored})


def _at(model: nn.Module, path: str) -> nn.ModuleList | None:
    """The list of modules at a dotted path; None if there is none, or it is empty."""
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.ModuleList) and len(found) else None
