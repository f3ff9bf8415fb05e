"""The kernels' order of a sliced weight: made from the bit planes at load, turned back into them on saving, never saved.

The saved planes are neutral: one bit of every weight, row by row. A tensor core wants several bits of few weights in the
registers of the right thread. So two planes at a time become a *unit* of 2-bit codes, and the codes of 16 rows by 128
columns become a *tile* of 128 words that one warp reads with one 16-byte load per thread::

    word ((r * 4 + t) * 2 + h) * 2 + c,   bits 16 p + 2 j, + 1    holds    row 8 h + r,   column 64 c + 8 j + 2 t + p

with r < 8, t < 4, h < 2, c < 2, j < 8, p < 2. ``(word >> shift) & 0x00030003`` then is a pair of neighbouring columns in the
place where the operand of `mma` wants it. README.md in this folder goes through it with an example.

Axes here and in the kernels: U units, T tiles of 128 columns, N padded rows of all linears, O and I the features of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mobiq_lightning.packing import PackedSlices, PackedWeight, depths_of, pack_planes, unpack_codes

TILE_COLUMNS = 128
TILE_ROWS = 16
WORDS_PER_ROW = 8
"""32-bit words that a row takes of a tile: sixteen 2-bit codes lie in one."""
ROW_BLOCK = 128
"""Rows of each linear are padded to a multiple of it, so that a program works for one linear alone."""
COLUMN_BLOCK = 256
_STEPS = (32, 64, 128)


@dataclass(frozen=True)
class KernelWeights:
    """Sliced weights of the linears that share an input, their rows one below the other, in the kernels' order.

    Args:
        units: (U, T, N * 8) int32: 2-bit codes of U units, T tiles along the columns, N padded rows.
        meta: (T * 128 / step, N) int32: for each step of columns and each row, the bits of the bfloat16 scale in the low
            half, those of the bias in the high half.
        counters: (N / 16,) int32 zeros: how many programs have finished a block of rows. Kernels leave them at zero, so
            one weight must not be used by two streams at once.
        out_features: Rows of each linear, unpadded.
        in_features: I.
        group_size: Columns that share a scale, as saved.
        slice_bits: Bits of each slice that is held.
    """

    units: Tensor
    meta: Tensor
    counters: Tensor
    out_features: tuple[int, ...]
    in_features: int
    group_size: int
    slice_bits: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Padded rows N of all linears together."""
        return self.meta.shape[1]

    @property
    def tiles(self) -> int:
        """Tiles T of 128 columns, a whole number of pairs."""
        return self.units.shape[1]

    @property
    def padded_group(self) -> int:
        """Columns that a group takes in the kernels' order: 32, 64 or a multiple of 128."""
        return padded_group(self.group_size)

    @property
    def step(self) -> int:
        """Columns that are multiplied before a scale is applied: 32, 64 or 128."""
        return min(self.padded_group, TILE_COLUMNS)

    @property
    def depths(self) -> tuple[int, ...]:
        """Bits that a token may read."""
        return depths_of(self.slice_bits)

    @property
    def row_starts(self) -> tuple[int, ...]:
        """First padded row of each linear."""
        starts = [0]
        for rows in self.out_features[:-1]:
            starts.append(starts[-1] + _padded(rows, ROW_BLOCK))
        return tuple(starts)

    def bytes_read(self, n_bits: int) -> int:
        """Bytes that a product at `n_bits` reads of the weights: whole units, scales and biases.

        Args:
            n_bits: A depth. An odd one costs the unit that its last bit is in.
        """
        units = -(-n_bits // 2)
        return 4 * (units * self.units[0].numel() + self.meta.numel())

    def to(self, device: torch.device | str) -> KernelWeights:
        """The weights on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("units", "meta", "counters")}
        return replace(self, **moved)


def padded_group(group_size: int) -> int:
    """Columns that a group takes in the kernels' order; those after the group's own are empty.

    Args:
        group_size: Columns that share a scale.
    """
    return next((step for step in _STEPS if group_size <= step), _padded(group_size, TILE_COLUMNS))


def relay(weights: Sequence[PackedWeight]) -> KernelWeights:
    """Brings the saved weights of linears that share an input into the kernels' order.

    Args:
        weights: Weights of the linears, all of one input, group size and slicing, in the nested code.

    Raises:
        ValueError: If they are in another code, differ in what they must share, or are too large for 32-bit offsets.
    """
    packed = [p for p in weights if isinstance(p, PackedSlices)]
    if len(packed) < len(weights):
        codes = sorted({p.code for p in weights if not isinstance(p, PackedSlices)})
        raise ValueError(f"the kernels read the nested code alone, not {', '.join(codes)}; use the reference")
    first = packed[0]
    if any((p.in_features, p.group_size, len(p.planes)) != _shared(first) for p in packed):
        raise ValueError("linears that are read together need the same in_features, group_size and number of planes")
    units = torch.cat([_units(p) for p in packed], dim=2)
    if units.numel() >= 2**31:
        raise ValueError(f"{units.numel() * 4 / 1e9:.1f} GB of codes in one product; the kernels take up to 8.6 GB")
    meta = torch.cat([_meta(p, units.shape[1]) for p in packed], dim=1)
    return KernelWeights(
        units,
        meta,
        torch.zeros(meta.shape[1] // TILE_ROWS, dtype=torch.int32, device=units.device),
        tuple(p.out_features for p in packed),
        first.in_features,
        first.group_size,
        _held(first),
    )


def restore(weights: KernelWeights, index: int) -> PackedSlices:
    """The saved form of one of the linears; what `relay` was given, bit by bit.

    Args:
        weights: Weights in the kernels' order.
        index: Which of the linears.
    """
    start, rows = weights.row_starts[index], weights.out_features[index]
    codes = codes_of(weights, start, rows)
    n_bits = sum(weights.slice_bits)
    codes = codes >> (2 * weights.units.shape[0] - n_bits)
    per_group = weights.padded_group // weights.step
    n_groups = -(-weights.in_features // weights.group_size)
    meta = weights.meta[::per_group][:n_groups, start : start + rows].t()

    def half(bits: Tensor) -> Tensor:
        return bits.to(torch.int16).view(torch.bfloat16).contiguous()

    return PackedSlices(
        tuple(pack_planes(codes.to(torch.uint8), n_bits).unbind()),
        (half(_signed(meta & 0xFFFF, 16)), half(meta >> 16)),
        weights.in_features,
        weights.group_size,
        weights.slice_bits,
    )


def codes_of(weights: KernelWeights, start: int, rows: int) -> Tensor:
    """Codes as the planes hold them, read back from the kernels' order.

    Args:
        weights: Weights in the kernels' order.
        start: First padded row.
        rows: How many rows.

    Returns:
        (rows, I) int32, 2 U bits each.
    """
    n_units, tiles = weights.units.shape[:2]
    first, last = start // TILE_ROWS, -(-(start + rows) // TILE_ROWS)
    words = weights.units.view(n_units, tiles, -1, 8, 4, 2, 2)[:, :, first:last]  # u g nb r t h c
    device = weights.units.device
    shift = 2 * torch.arange(8, device=device).view(8, 1) + 16 * torch.arange(2, device=device)
    codes = (words[..., None, None] >> shift) & 3  # u g nb r t h c j p
    codes = codes.permute(0, 2, 5, 3, 1, 6, 7, 4, 8).reshape(n_units, (last - first) * TILE_ROWS, -1)
    value: Tensor = torch.zeros_like(codes[0])
    for unit in codes:
        value = value << 2 | unit
    per_group, size = weights.padded_group, weights.group_size
    value = value.unflatten(1, (-1, per_group))[..., :size].flatten(1)[:, : weights.in_features]
    wanted: Tensor = value[start - first * TILE_ROWS :][:rows]
    return wanted


def column_map(weights: KernelWeights) -> Tensor:
    """Which column of the input each column in the kernels' order holds.

    Returns:
        (T * 128,) int64, -1 where a column is empty.
    """
    column = torch.arange(weights.tiles * TILE_COLUMNS, device=weights.units.device)
    within = column % weights.padded_group
    source = column // weights.padded_group * weights.group_size + within
    return torch.where((within < weights.group_size) & (source < weights.in_features), source, -1)


def _units(packed: PackedSlices) -> Tensor:
    """`KernelWeights.units` (U, T, N * 8) of one linear."""
    n_bits = len(packed.planes)
    codes = unpack_codes(list(packed.planes), packed.in_features).to(torch.int32)
    codes = _spread_groups(codes, packed)
    if n_bits % 2:
        codes = codes << 1
    n_units = (n_bits + 1) // 2
    rows, columns = codes.shape
    codes = F.pad(codes, (0, -columns % COLUMN_BLOCK, 0, -rows % ROW_BLOCK))
    shift = torch.arange(16, dtype=torch.int32, device=codes.device)
    position = 2 * shift[:8].view(8, 1, 1) + 16 * shift[:2]
    units = []
    for unit in range(n_units):
        code = (codes >> (2 * (n_units - 1 - unit))) & 3
        tiled = code.view(codes.shape[0] // TILE_ROWS, 2, 8, codes.shape[1] // TILE_COLUMNS, 2, 8, 4, 2)
        words = (tiled << position).sum(dim=(5, 7), dtype=torch.int32)  # nb h r g c t; bits do not overlap
        units.append(words.permute(3, 0, 2, 5, 1, 4).reshape(words.shape[3], -1))  # g | nb r t h c
    return torch.stack(units)


def _meta(packed: PackedSlices, tiles: int) -> Tensor:
    """`KernelWeights.meta` (T * 128 / step, N) of one linear."""
    padded = padded_group(packed.group_size)
    step = min(padded, TILE_COLUMNS)

    def bits(values: Tensor) -> Tensor:
        words = values.to(torch.bfloat16).t().contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
        words = words.repeat_interleave(padded // step, dim=0)
        missing = (0, -words.shape[1] % ROW_BLOCK, 0, tiles * TILE_COLUMNS // step - words.shape[0])
        return F.pad(words, missing)

    both: Tensor = bits(packed.scale) | bits(packed.bias) << 16
    return both


def _spread_groups(codes: Tensor, packed: PackedSlices) -> Tensor:
    """Codes with every group padded to what it takes in the kernels' order."""
    size, padded = packed.group_size, padded_group(packed.group_size)
    if size == padded:
        return codes
    codes = F.pad(codes, (0, -codes.shape[1] % size))
    spread: Tensor = F.pad(codes.unflatten(1, (-1, size)), (0, padded - size)).flatten(1)
    return spread


def _held(packed: PackedSlices) -> tuple[int, ...]:
    """The slices whose planes are there."""
    return tuple(
        b for b, d in zip(packed.slice_bits, depths_of(packed.slice_bits), strict=True) if d <= len(packed.planes)
    )


def _shared(packed: PackedSlices) -> tuple[int, int, int]:
    return packed.in_features, packed.group_size, len(packed.planes)


def _padded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _signed(words: Tensor, n_bits: int) -> Tensor:
    """Unsigned `n_bits`-bit values of an int32 tensor as signed ones."""
    return torch.where(words >= 1 << (n_bits - 1), words - (1 << n_bits), words)
