"""How large a model is and what of it will be sliced: known from its shapes alone, before a weight is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mobiq_lightning.calibration.apply_transform import check_experts
from mobiq_lightning.nn import Learned, experts_of
from mobiq_lightning.packing import n_groups

if TYPE_CHECKING:
    from mobiq_lightning.calibration.module import ElasticCalibration
    from mobiq_lightning.strategies.base import SliceScheme

_WORTH_SAYING = 0.01
"""Part of the weights in blocks from which on matrices that are not sliced are named."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model that is sliced, in numbers and bytes.

    Args:
        kind: Name of the class of the model.
        n_blocks: Decoder blocks.
        width: Features of the hidden states.
        vocabulary: Rows of the embedding.
        cache_bytes: Bytes of the keys and values of one token in all blocks.
        itemsize: Bytes of one number of the frozen weights.
        model_bytes: Bytes of all frozen weights.
        block_bytes: Bytes of the frozen weights of the largest block.
        block_weights: Numbers in the weights of all blocks, norms and biases included.
        kept: Numbers in matrices of blocks that are not sliced, by name within a block.
        sliced: Sliced weights of all blocks.
        sliced_of_block: Sliced weights of the largest block.
        largest_linear: Weights of the largest linear.
        largest_input: Weights of the linears that read one input, for the input with most of them.
        n_inputs: Routed inputs of all blocks.
        shapes: Sliced linears (out_features, in_features), each shape with how often it is there.
        slice_bits: Bits of the slices, coarsest first.
        group_size: Columns that share a range; None if the slice scheme has no groups.
        uneven: Names of linears in the first block that have them whose width is no multiple of the groups, each with its
            width and the columns of the last group.
        learned: Numbers that are learned in all blocks, by kind, without codes.
    """

    kind: str
    n_blocks: int
    width: int
    vocabulary: int
    cache_bytes: int
    itemsize: int
    model_bytes: int
    block_bytes: int
    block_weights: int
    kept: dict[str, int]
    sliced: int
    sliced_of_block: int
    largest_linear: int
    largest_input: int
    n_inputs: int
    shapes: dict[tuple[int, int], int]
    slice_bits: tuple[int, ...]
    group_size: int | None
    uneven: dict[str, tuple[int, int]]
    learned: dict[Learned, int]

    @property
    def share(self) -> float:
        """The part of the numbers in all blocks that is sliced."""
        return self.sliced / self.block_weights

    @property
    def left_out(self) -> str:
        """What of the blocks stays in full precision, in words, if it is a hundredth of them or more; else nothing."""
        shares = {name: count / self.block_weights for name, count in self.kept.items()}
        large = [f"{name} ({share:.1%})" for name, share in shares.items() if share >= _WORTH_SAYING]
        return ", ".join(large)


class _Plugins:
    """What the recipe's slices, routers and transforms learn of a linear or input, built once for each size.

    Args:
        module: Has the factories.
    """

    def __init__(self, module: ElasticCalibration) -> None:
        self.module = module
        self.schemes: dict[tuple[int, int], SliceScheme] = {}
        self._routers: dict[tuple[int, int], int] = {}
        self._transforms: dict[int, int] = {}

    def scheme(self, shape: tuple[int, int]) -> SliceScheme:
        """The slice scheme of a linear (out_features, in_features)."""
        if shape not in self.schemes:
            self.schemes[shape] = self.module.slices(*shape)
        return self.schemes[shape]

    def of_router(self, width: int, n_slices: int) -> int:
        """Numbers that the router of an input learns."""
        if (width, n_slices) not in self._routers:
            self._routers[width, n_slices] = _numbers(self.module.router(width, n_slices))
        return self._routers[width, n_slices]

    def of_transform(self, width: int) -> int:
        """Numbers that the transform of an input learns."""
        if width not in self._transforms:
            made: Any = self.module.transform.for_input(width)
            self._transforms[width] = 0 if made is None else _numbers(made)
        return self._transforms[width]


def sizes_of(model: Any, module: ElasticCalibration) -> ModelSizes:
    """Measures a model; its weights may be on the meta device, and its linears may be sliced already. Experts are opened.

    Args:
        model: The causal language model.
        module: Says how it is sliced: layout, slices, routers, transform.

    Raises:
        ModelError: If there are no decoder blocks where the layout has them, a block holds no linear, or experts are of a form
            that is not known.
    """
    module.layout.open(model, compare=False)
    check_experts(module.layout, list(module.layout.find(model)), module.transform)
    with torch.random.fork_rng(devices=[]):  # routers draw what they begin with
        return _sizes_of(model, module)


def _sizes_of(model: Any, module: ElasticCalibration) -> ModelSizes:
    blocks, plugins = module.layout.find(model), _Plugins(module)
    shapes: dict[tuple[int, int], int] = {}
    uneven: dict[str, tuple[int, int]] = {}
    learned: dict[Learned, int] = {"ranges": 0, "transforms": 0, "routers": 0}
    kept: Counter[str] = Counter()
    inputs: list[int] = []
    of_blocks: list[int] = []
    for block in blocks:
        before = sum(inputs)
        for names in module.layout.group_linears(block, module.share_routers):
            of_input, width = 0, 0
            for name in names:
                linear: Any = block.get_submodule(name)
                shape = (linear.out_features, linear.in_features)
                scheme = plugins.scheme(shape)
                shapes[shape] = shapes.get(shape, 0) + 1
                of_input, width = of_input + shape[0] * shape[1], width or shape[1]
                learned["ranges"] += _numbers(scheme)
                columns = getattr(scheme, "group_size", None)
                if columns is not None and columns < shape[1] and shape[1] % columns:
                    uneven.setdefault(_of_all(block, name), (shape[1], shape[1] % columns))
            inputs.append(of_input)
            learned["routers"] += plugins.of_router(width, len(scheme.slice_bits))
            learned["transforms"] += plugins.of_transform(width)
        of_blocks.append(sum(inputs) - before)
        for name, parameter in module.layout.kept(block).items():
            kept[name] += parameter.numel()
    frozen = [_frozen(block) for block in blocks]
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    itemsize = next(model.parameters()).element_size()
    of_queries = int(getattr(config, "num_attention_heads", None) or 1)
    heads = int(getattr(config, "num_key_value_heads", None) or of_queries)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // of_queries)
    return ModelSizes(
        kind=type(model).__name__,
        n_blocks=len(blocks),
        width=config.hidden_size,
        vocabulary=model.get_input_embeddings().num_embeddings,
        cache_bytes=2 * len(blocks) * heads * head * itemsize,
        itemsize=itemsize,
        model_bytes=itemsize * sum(p.numel() for p in model.parameters()),
        block_bytes=itemsize * max(frozen),
        block_weights=sum(frozen),
        kept=dict(kept),
        sliced=sum(inputs),
        sliced_of_block=max(of_blocks),
        largest_linear=max(o * i for o, i in shapes),
        largest_input=max(inputs),
        n_inputs=len(inputs),
        shapes=shapes,
        slice_bits=tuple(scheme.slice_bits),
        group_size=getattr(scheme, "group_size", None),
        uneven=uneven,
        learned=learned,
    )


def groups_of(sizes: ModelSizes) -> int:
    """Groups of all sliced linears, each of which stores a scale and a bias."""
    columns = sizes.group_size or 2**31
    return sum(count * o * n_groups(i, min(columns, i)) for (o, i), count in sizes.shapes.items())


def _of_all(block: nn.Module, name: str) -> str:
    """Name of a linear; one name for those of all experts of a block."""
    experts = experts_of(block, name)
    return name if experts is None else f"{experts}.*.{name.rpartition('.')[2]}"


def _numbers(module: nn.Module) -> int:
    """Numbers that a module learns; a target of codes is empty until its slice begins."""
    return sum(p.numel() for p in module.parameters())


def _frozen(block: nn.Module) -> int:
    """Numbers of the frozen weights of a block; schemes and routers of sliced linears are not registered in it."""
    return sum(p.numel() for p in block.parameters())
