"""Packing codes into bytes."""

import pytest
import torch

from actpress.kernels.common.bits import BITS, pack, packed_bytes, unpack


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 63, 197])
def test_unpack_inverts_pack(bits, count):
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (packed_bytes(count, bits),)
    assert torch.equal(unpack(packed, bits, count), codes)


def test_neighbours_share_a_byte_lowest_bits_first():
    assert pack(torch.tensor([1, 2, 3, 0, 2], dtype=torch.uint8), 2).tolist() == [0b00111001, 0b10]
    assert pack(torch.tensor([True, False, True]), 1).tolist() == [0b101]
