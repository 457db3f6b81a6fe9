"""Checks that kernels share."""

import pytest
import torch

from dsv4.kernels.common.checks import check_aligned


def test_data_that_is_not_aligned_is_named() -> None:
    room = torch.zeros(64, dtype=torch.uint8)
    at = room.data_ptr() % 16
    whole, odd = room[(16 - at) % 16 :][:16], room[(16 - at) % 16 + 4 :][:16]
    check_aligned(16, x=whole, nothing=odd[:0])
    check_aligned(4, x=odd)
    with pytest.raises(ValueError, match="w: expected an address that is a multiple of 16, got 0x"):
        check_aligned(16, x=whole, w=odd)
