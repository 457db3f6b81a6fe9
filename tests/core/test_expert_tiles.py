"""The order of expert weights in device memory."""

import pytest
import torch

from dsv4.core.expert_tiles import from_tiles, to_tiles


@pytest.mark.parametrize(("N", "columns", "size"), [(8, 128, 4), (16, 384, 192), (128, 256, 32)])
def test_tiles_and_back(N: int, columns: int, size: int) -> None:
    x = torch.randint(0, 256, (3, N, size), dtype=torch.uint8)
    tiles = to_tiles(x, columns)
    assert tiles.shape == (3, N // 8, columns // 128, 8, 128 * size // columns)
    assert tiles.data_ptr() == x.data_ptr()
    assert torch.equal(from_tiles(tiles.contiguous()), x)


def test_a_tile_is_8_rows_of_128_columns() -> None:
    codes = torch.arange(16 * 128).view(16, 128)  # 256 columns
    tile = to_tiles(codes, 256)[1, 1]
    assert torch.equal(tile, codes[8:, 64:])


@pytest.mark.parametrize(("N", "columns"), [(12, 128), (8, 192)])
def test_parts_of_a_tile_are_refused(N: int, columns: int) -> None:
    with pytest.raises(ValueError, match="x: expected multiples of 8 rows and 128 columns, got"):
        to_tiles(torch.zeros(N, columns // 2, dtype=torch.uint8), columns)
