"""The order of FP4 expert weights in device memory: tiles of 8 rows and 128 columns.

A checkpoint stores a matrix row by row, so a kernel that streams a few rows touches many distant
pieces of memory; in tiles what it reads together lies together. Bytes are moved, never changed.
"""

from torch import Tensor

ROWS, COLUMNS = 8, 128


def to_tiles(x: Tensor, columns: int) -> Tensor:
    """Codes or scales of matrices with `columns` columns, as stored -> a view in tiles.

    x  [.., N, B], a row of a matrix in B bytes -> [.., N / 8, columns / 128, 8, 128 B / columns]
    Raises ValueError for matrices that are not whole tiles. `from_tiles` is the inverse.
    """
    N, size = x.shape[-2:]
    if N % ROWS or columns % COLUMNS:
        raise ValueError(
            f"x: expected multiples of {ROWS} rows and {COLUMNS} columns, got {N} and {columns}"
        )
    steps = columns // COLUMNS
    tiles = x.unflatten(-1, (steps, size // steps)).unflatten(-3, (N // ROWS, ROWS))
    return tiles.transpose(-3, -2)


def from_tiles(x: Tensor) -> Tensor:
    """The inverse of `to_tiles`: [.., N / 8, S, 8, b] -> [.., N, S b]"""
    return x.transpose(-3, -2).flatten(-2).flatten(-3, -2)
