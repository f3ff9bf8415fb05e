"""Where the decoder blocks of a model are, and which of their linears read the same input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from mobiq_lightning.errors import ModelError
from mobiq_lightning.nn.sliced_linear import SlicedLinear

Share = Literal["input", "linear"]


@dataclass
class BlockLayout:
    """Where the decoder blocks of a model are, and which of their linears read the same input.

    Args:
        blocks: Dotted path of the list of decoder blocks.
        shared_inputs: Groups of linears, by the last part of their name, that read one input. Every other linear has an
            input of its own.
    """

    blocks: str = "model.layers"
    shared_inputs: list[list[str]] = field(
        default_factory=lambda: [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    )

    def find(self, model: nn.Module) -> nn.ModuleList:
        """Finds the list of decoder blocks of a model.

        Raises:
            ModelError: If `blocks` is not the path of a list of modules, or the list is empty.
        """
        found: Any = model
        for part in self.blocks.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, nn.ModuleList) or len(found) == 0:
            lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
            raise ModelError(
                f"{type(model).__name__} has no list of decoder blocks at {self.blocks!r}; LLaMA, Mistral, Qwen2 and "
                f"relatives have. Name the list in model.layout.blocks (lists in this model: {', '.join(lists) or 'none'})"
            )
        return found

    def group_linears(self, block: nn.Module, share: Share) -> list[list[str]]:
        """Groups the names of the linears of a block by the router that they share, in the order of the modules.

        Args:
            block: A decoder block.
            share: ``input`` if linears that read one input share a router, ``linear`` if each has its own.

        Raises:
            ModelError: If the block holds no linear.
        """
        names = [name for name, module in block.named_modules() if isinstance(module, (nn.Linear, SlicedLinear))]
        if not names:
            raise ModelError(f"the blocks at {self.blocks!r} ({type(block).__name__}) hold no nn.Linear to slice")
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            parent, _, last = name.rpartition(".")
            shared = next((tuple(g) for g in self.shared_inputs if last in g), (last,)) if share == "input" else (last,)
            groups.setdefault((parent, *shared), []).append(name)
        return list(groups.values())
