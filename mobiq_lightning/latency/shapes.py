"""Names the shapes whose products are timed: those of known models, of a checkpoint, or of given sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mobiq_lightning.latency.names import PARTS, SIZES, sizes_of, split
from mobiq_lightning.nn import ElasticLinear, RoutedExperts, product_groups
from mobiq_lightning.packing import PackedSlices, depths_of

SLICE_BITS = (2, 1, 1, 2, 2)
GROUP_SIZE = 128
_PARTS = {"q_proj": "qkv", "gate_proj": "gate_up"}


@dataclass(frozen=True)
class Shape:
    """The shape of a product of one input with all linears that read it.

    Args:
        model: Name of the model that has the product.
        part: Name of the input in a block, such as ``qkv`` or ``down``.
        out_features: Rows of each linear.
        in_features: Columns of the linears.
        slice_bits: Bits of each slice.
        group_size: Columns that share a scale.
        code: Name of the code of the weights that the shape was taken from.
    """

    model: str
    part: str
    out_features: tuple[int, ...]
    in_features: int
    slice_bits: tuple[int, ...] = SLICE_BITS
    group_size: int = GROUP_SIZE
    code: str = PackedSlices.code

    @property
    def name(self) -> str:
        """The name of model and part, such as ``llama-2-7b.gate_up``."""
        return f"{self.model}.{self.part}"

    @property
    def rows(self) -> int:
        """Rows of all linears together, unpadded."""
        return sum(self.out_features)

    @property
    def n_weights(self) -> int:
        """Number of weights of all linears together."""
        return self.rows * self.in_features

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths in bits that a token may read, ascending."""
        return depths_of(self.slice_bits)


def _llama(model: str, hidden: int, key_value: int, intermediate: int) -> list[Shape]:
    rows = ((hidden, key_value, key_value), (hidden,), (intermediate, intermediate), (hidden,))
    columns = (hidden, hidden, hidden, intermediate)
    return [Shape(model, part, o, i) for part, o, i in zip(PARTS, rows, columns, strict=True)]


MODELS = {name: _llama(name, *sizes) for name, sizes in SIZES.items()}
"""By name of the model, the shapes of one decoder block; linears that share an input are one shape."""


def parse_shapes(text: str) -> list[Shape]:
    """Reads the shapes that a command line names.

    Args:
        text: Names of `MODELS`, of one of their parts (``llama-2-7b.down``), or ``ROWSxCOLUMNS``, separated by commas.

    Raises:
        RecipeError: If a name is none of these, with the nearest one.
    """
    single = {shape.name: shape for shapes in MODELS.values() for shape in shapes}
    found: list[Shape] = []
    for name in split(text):
        sizes = sizes_of(name)
        if sizes is not None:
            found.append(Shape("given", name, (sizes[0],), sizes[1]))
        else:
            found += MODELS.get(name) or [single[name]]
    return found


def groups_of(model: nn.Module, name: str) -> dict[Shape, list[list[ElasticLinear]]]:
    """The distinct shapes of an elastic model, each with the groups of linears, one per input, that have it.

    Of the experts of a block so many count as a token goes to.

    Args:
        model: Model with elastic linears, whose weights need not be there.
        name: Name of the model that the shapes carry.
    """
    experts = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    left_out = {id(linear) for of_block in experts for linear in of_block.linears()[2 * of_block.top_k :]}
    groups: dict[Shape, list[list[ElasticLinear]]] = {}
    for named in product_groups(model):
        first, linears = named[0][0].rpartition(".")[2], [linear for _, linear in named]
        if id(linears[0]) in left_out:
            continue
        shared = _PARTS.get(first, first) if len(named) > 1 else first
        shape = Shape(
            name,
            shared.removesuffix("_proj"),
            tuple(linear.out_features for linear in linears),
            linears[0].in_features,
            linears[0].slice_bits,
            linears[0].group_size,
            linears[0].code,
        )
        groups.setdefault(shape, []).append(linears)
    return groups


def shapes_of_checkpoint(run: str) -> list[Shape]:
    """The distinct shapes of the sliced linears of an elastic checkpoint; no weight is read.

    Args:
        run: Run folder, elastic checkpoint or hub id.

    Raises:
        CheckpointError: If there is no elastic checkpoint.
    """
    from mobiq_lightning.checkpoint import skeleton, summarize_checkpoint

    summary = summarize_checkpoint(run)
    model: Any = skeleton(summary.folder, summary.config)
    folder = summary.folder
    return list(groups_of(model, folder.parent.name if folder.name == "elastic" else folder.name))


def widest(shapes: list[Shape]) -> Shape:
    """The shape where most of the time goes: the first ``gate_up``, or else the one with the most weights."""
    return next((s for s in shapes if s.part == "gate_up"), max(shapes, key=lambda s: s.n_weights))
