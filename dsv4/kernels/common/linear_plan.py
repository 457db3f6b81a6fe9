"""How a linear layer is cut into pieces, and the checks of block-scaled weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

BLOCK = 128  # columns, and rows, that share a scale
ROWS = 64  # of a tile
UNITS = 4  # (tile, chunk) pairs of a block, or a multiple
MAX_CHUNK = 12  # blocks at most; it decides about bits, as all that `cut` uses
MAX_CLUSTER = 8
MIN_PROGRAMS = 128  # fewer whole tiles than this are split over chunks
MAX_CLUSTERED = 96  # blocks in clusters of more than 2 that run at once for certain, one an SM
START_STEPS = 8  # what a block costs, in tiles of 128 columns
NUM_SMS = 132  # of the device the cut was made for; fixed, because the cut decides about bits
WIDE_CHUNKS = 4  # of a block: one for each warpgroup
STEP_ROWS = 20  # what a step of 128 columns costs beside its rows, in rows
# Blocks in clusters of so many that run at once, one an SM; MAX_CLUSTERED where it is not said. The
# SMs are pairs in 8 groups of at most 18, and a cluster stays within a group: of clusters of 3 an
# H200 held 39 at once.
AT_ONCE = {1: NUM_SMS, 2: NUM_SMS, 3: 117}


@dataclass(frozen=True)
class Cut:
    """How the columns of a weight are cut. Depends on its shape alone, because sums depend on it.

    chunk, num_chunks  blocks of 128 columns in a chunk, and the number of chunks
    tiles, chunks, cluster  for kernels with clusters: a block has `tiles` tiles of 64 rows times
                       `chunks` chunks, and `cluster` blocks hold all chunks of the same rows;
                       0 tiles where the shape does not suit them
    """

    chunk: int
    num_chunks: int
    tiles: int = 0
    chunks: int = 0
    cluster: int = 0


@cache
def cut(N: int, K: int, groups: int = 1) -> Cut:
    """The cut of a weight [N, K] that fills the SMs best."""
    blocks, rows = triton.cdiv(K, BLOCK), N // groups
    best, least = Cut(blocks, 1), float("inf")
    for tiles in (4, 2, 1):
        if rows % (ROWS * tiles) or K % BLOCK:
            continue
        for cluster in range(1, MAX_CLUSTER + 1):
            chunks = UNITS // tiles
            chunks *= triton.cdiv(blocks, cluster * chunks * MAX_CHUNK)
            chunk = triton.cdiv(blocks, cluster * chunks)
            if (cluster - 1) * chunks * chunk >= blocks:
                continue  # a block without work
            programs = N // (ROWS * tiles) * cluster
            if cluster > 2 and programs > MAX_CLUSTERED:
                continue
            steps = triton.cdiv(programs, NUM_SMS) * (tiles * chunks * chunk + START_STEPS)
            if steps < least:
                num_chunks = triton.cdiv(blocks, chunk)
                best, least = Cut(chunk, num_chunks, tiles, chunks, cluster), steps
    return best


@dataclass(frozen=True)
class WideCut:
    """How the columns of a BF16 weight are cut. Depends on its shape alone, as `Cut` does.

    num_chunks     chunk c of C is the blocks c B / C up to (c + 1) B / C of all B, rounded down
    rows, cluster  for the kernel with clusters: `cluster` blocks hold all chunks of the same `rows`
                   rows, WIDE_CHUNKS chunks each; 0 where the shape does not suit it
    """

    num_chunks: int
    rows: int = 0
    cluster: int = 0

    def first_block(self, chunk: int, K: int) -> int:
        """The block of 128 columns that a chunk begins with."""
        return chunk * triton.cdiv(K, BLOCK) // self.num_chunks


@cache
def wide_cut(N: int, K: int) -> WideCut:
    """The cut of a BF16 weight [N, K] that gives each SM least to do, all blocks at once."""
    blocks = triton.cdiv(K, BLOCK)
    best, least = WideCut(min(WIDE_CHUNKS, blocks)), float("inf")
    for rows in (64, 32, 16):
        for cluster in range(1, MAX_CLUSTER + 1):
            num_chunks, programs = WIDE_CHUNKS * cluster, triton.cdiv(N, rows) * cluster
            is_too_many = programs > AT_ONCE.get(cluster, MAX_CLUSTERED)
            if K % BLOCK or num_chunks > blocks or is_too_many:
                continue
            steps = triton.cdiv(blocks, cluster) * (rows + STEP_ROWS)
            if steps < least:
                best, least = WideCut(num_chunks, rows, cluster), steps
    return best


@dataclass(frozen=True)
class TilePlan:
    """Programs of a Triton kernel: (tiles of rows, chunks if they are split, tiles of tokens)."""

    tile: Mapping[str, int]
    grid: tuple[int, int, int]
    tiles_per_group: int
    is_split: bool


def tile_plan(
    config: Mapping[int, Mapping[str, int]], T: int, N: int, groups: int, num_chunks: int
) -> TilePlan:
    """The tile for `T` tokens; chunks become programs where whole tiles would be too few."""
    tile = next(tile for most, tile in config.items() if most >= T)
    per_group, columns = triton.cdiv(N // groups, tile["BN"]), triton.cdiv(T, tile["BM"])
    # Partial sums of large tiles are megabytes each: rather some idle SMs.
    least = MIN_PROGRAMS if tile["BM"] <= 64 else MIN_PROGRAMS * 3 // 8
    is_split = num_chunks > 1 and groups * per_group * columns < least
    grid = (groups * per_group, num_chunks if is_split else 1, columns)
    return TilePlan(tile, grid, per_group, is_split)


def check_scale(name: str, scale: Tensor, N: int, K: int) -> torch.dtype:
    """The dtype, UE8M0 or FP32, of one scale for each 128 x 128 of a weight [N, K]."""
    if scale.dtype not in (torch.float8_e8m0fnu, torch.float32):
        raise ValueError(
            f"{name}: expected torch.float8_e8m0fnu or torch.float32, got {scale.dtype}"
        )
    want = [triton.cdiv(N, BLOCK), triton.cdiv(K, BLOCK)]
    if list(scale.shape) != want:
        raise ValueError(f"{name}: expected shape {want} for [{N}, {K}], got {list(scale.shape)}")
    return scale.dtype
