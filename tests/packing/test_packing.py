"""The storage format."""

from __future__ import annotations

import pytest
import torch

from mobiq_lightning.packing import depths_of, dequantize, pack_planes, unpack_codes


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 172])
@pytest.mark.parametrize("n_bits", [1, 3, 8])
def test_unpacking_gives_back_the_codes(columns: int, n_bits: int) -> None:
    codes = torch.randint(0, 2**n_bits, (5, columns), dtype=torch.uint8)
    planes = pack_planes(codes, n_bits)
    assert planes.shape == (n_bits, 5, -(-columns // 8))
    assert torch.equal(unpack_codes(planes, columns), codes)


def test_fewer_planes_truncate_the_code() -> None:
    codes = torch.randint(0, 256, (4, 30), dtype=torch.uint8)
    planes = pack_planes(codes, 8)
    for n_bits in range(1, 9):
        assert torch.equal(unpack_codes(planes[:n_bits], 30), codes >> (8 - n_bits))


def test_the_first_column_is_the_highest_bit_of_its_byte() -> None:
    codes = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.uint8)
    assert pack_planes(codes, 1).tolist() == [[[128, 128]]]


def test_a_weight_is_the_middle_of_its_cell() -> None:
    codes = torch.tensor([[0, 1, 2, 3]])
    weight = dequantize(codes, 2, scale=torch.tensor([[4.0]]), bias=torch.tensor([[1.0]]), group_size=4)
    assert weight.tolist() == [[-0.5, 0.5, 1.5, 2.5]]  # cells of width 1 from -1 to 3


def test_depths_are_the_running_sum_of_the_slices() -> None:
    assert depths_of((2, 1, 1, 4)) == (2, 3, 4, 8)


def test_unpacking_no_planes_is_refused() -> None:
    with pytest.raises(ValueError, match="no bit planes were given"):
        unpack_codes([], 8)
