"""Non-uniform slices: nested clusters of weights with a learned value each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mobiq_lightning.packing import SCALE_DTYPE, WHOLE_ROW, PackedTables, look_up, pack_planes
from mobiq_lightning.strategies.slices.fixed_codes import FixedCodeSlices, follow
from mobiq_lightning.strategies.slices.kmeans_fit import fit_clusters
from mobiq_lightning.strategies.slices.ranges import extremes, round_as_stored


class KMeansSlices(FixedCodeSlices):
    """Nested non-uniform codes by incremental upscaling (Any-Precision LLM, arXiv 2402.10517, section 3).

    The weights of each group are cut into ``2^b`` clusters by one-dimensional k-means, b being the bits of the base slice;
    each further bit cuts every cluster in two. A code names its cluster, and its first p bits name the cluster of depth
    p that this one came from. At each depth that the slices can be read at, a table holds a value per cluster, at first
    the mean of its weights (all weights count alike here; the paper weighs them by sensitivity). The values are
    learned, in units of the mean width of a cluster; the codes stay as they were found. A depth that neither the
    objective nor routed tokens read keeps its means, as depths share no values.

    Tables are large: at depths of 2, 3, 4, 6 and 8 bits they hold 348 values, which is 87 bits per weight for a group of 64,
    and 1.4 bits for a row of 4096. Hence the default of one group per row, as in the paper, and of no depth beyond 4 bits.

    Args:
        out_features: Rows of the weight, O.
        in_features: Columns of the weight, I; the last group may be shorter than `group_size`.
        slice_bits: Bits of each slice, coarsest first; any positive integers with a sum of at most 8. By default they reach 4
            bits, not 8 as in other schemes, since a table has 2^bits entries.
        group_size: Columns that share tables; by default a whole row.

    Example:
        ``slices: {class_path: KMeansSlices, init_args: {slice_bits: [2, 1, 1]}}``
    """

    code = PackedTables.code

    def __init__(
        self,
        out_features: int,
        in_features: int,
        slice_bits: Sequence[int] = (2, 1, 1),
        group_size: int = WHOLE_ROW,
    ) -> None:
        super().__init__(out_features, in_features, slice_bits, group_size)
        self.shifts = nn.ParameterList(torch.zeros(*self.group_shape, 2**depth) for depth in self.depths)

    def weight_at(self, weight: Tensor, n_slices: int) -> Tensor:
        """Gives the weight (O, I) float32 read with its first `n_slices` slices, differentiable in the tables."""
        codes = self.found(weight)[0] >> (self.depths[-1] - self.depths[n_slices - 1])
        return follow(look_up(codes, self._table(weight, n_slices - 1), self.group_size), weight)

    @torch.no_grad()
    def pack(self, weight: Tensor) -> PackedTables:
        """Packs the weight (O, I): one plane per bit, and a table (O, G, 2^p) for each depth p of the slices."""
        planes = tuple(pack_planes(self.found(weight)[0], self.depths[-1]))
        tables = tuple(self._table(weight, number).to(SCALE_DTYPE) for number in range(len(self.depths)))
        return PackedTables(planes, tables, self.in_features, self.group_size, self.slice_bits)

    def find(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Finds codes (O, I), spread (O, G), and a table (O, G, 2^p) of means for each depth p, of some rows (O, I)."""
        low, high = extremes(weight, self.group_size)
        codes, tables = fit_clusters(weight, self.depths, self.group_size)
        return codes, high - low, *tables

    def _table(self, weight: Tensor, number: int) -> Tensor:
        """Values (O, G, 2^p) at the depth of `number` + 1 slices, as stored."""
        _, spread, *tables = self.found(weight)
        width = spread.unsqueeze(-1) * 2.0 ** -self.depths[number]
        return round_as_stored(tables[number] + width * self.shifts[number])
