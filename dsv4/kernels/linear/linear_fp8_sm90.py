"""FP8 linears of few tokens on Hopper, one launch of CUDA C++ (linear_fp8_sm90.cu).

The Triton kernel waits for shared memory twice in a step of 128 columns and reaches 47 and 59 % of
the read bandwidth (H200, one token, wo_b and wq_b of V4-Flash); this one 69 and 77 %. Nothing in
its loop waits but for the weights, and it asks for the first of them before the kernel in front of
it has ended. From 17 tokens on a block has more rows and one chunk, and blocks add chunks in global
memory. Chunks and the order of sums are those of the Triton kernel, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.core.errors import KernelUnavailable
from dsv4.kernels.common import cuda
from dsv4.kernels.common.checks import check_aligned
from dsv4.kernels.common.linear_device import DEVICE
from dsv4.kernels.common.linear_plan import UNITS, Cut, cut
from dsv4.kernels.linear.linear_fp8 import REFERENCE, check, outputs

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "linear_fp8_kernel", "outputs"]

MAX_TOKENS = 64
MAX_ROWS = 1 << 18  # whose group one multiplication tells: rows and groups are multiples of 64
SHARED_BYTES = 227 << 10
PITCH_BYTES = 68 * 4  # of the sums of one token
# Columns of the matrix instruction -> steps of weights under way, at most.
CONFIG = {8: 4, 16: 4, 32: 3, 64: 3}
PUSH_TOKENS = 8  # the sums of more leave too little room for weights
MOST_CLUSTERED = 16  # columns up to which all of an output is added within a cluster
EARLY_STEPS = 1  # of weights, for more columns, asked for before the kernel in front has ended
PATIENCE = 30_000  # clocks that a block waits for others
KEEP, ROUND, ROUNDED = range(3)  # what happens to x
WARPGROUPS = 4
STEP_BYTES = WARPGROUPS * 64 * 128
MAX_PARTS = 48  # chunks in several blocks: each has a bit in the word of a tile
# Compiled ahead of time: chunks in several blocks, in one, and too long for x in one pass.
AOT_SHAPES = (4096, 8192, 1), (32768, 1024, 1), (7168, 16384, 1)


@dataclass(frozen=True, eq=False)  # `plan` gives one for each call, and a source is made of it once
class _Plan:
    """One launch of `grid` blocks of one of the two kernels."""

    grid: int
    defines: dict[str, int]
    shared: int
    is_streamed: bool


def _cluster_plan(tokens: int, N: int, c: Cut) -> _Plan | None:
    """All chunks of some rows in a cluster. None where the tokens of a block do not fit."""
    blocks = c.chunks * c.chunk
    fixed = blocks * 256 * tokens + (c.tiles * blocks * 4 + 15) // 16 * 16
    is_push = c.cluster > 1 and tokens <= PUSH_TOKENS
    sent = c.cluster * c.chunks * -(-tokens // c.cluster) * c.tiles * 256 + 8 if is_push else 0
    depth = min(CONFIG[tokens], (SHARED_BYTES - fixed - sent) // STEP_BYTES)
    shared = max(fixed + depth * STEP_BYTES + sent, c.tiles * c.chunks * tokens * PITCH_BYTES)
    if depth < 2 or shared > SHARED_BYTES:
        return None
    defines = {
        "NTOK": tokens, "NWG": WARPGROUPS, "RT": c.tiles, "KW": c.chunks, "CHUNK": c.chunk,
        "CLUSTER": c.cluster, "DEPTH": depth, "PUSH": int(is_push),
    }  # fmt: skip
    return _Plan(N // (64 * c.tiles) * c.cluster, defines, shared, False)


def _stream_plan(tokens: int, N: int, c: Cut) -> _Plan:
    """One chunk of four tiles a block, x in as few passes as fit."""
    depth = min(CONFIG[tokens], c.chunk)
    fixed = depth * STEP_BYTES + c.chunk * 8 + 8
    passes = -(-c.chunk // ((SHARED_BYTES - fixed) // (256 * tokens)))
    staged = -(-c.chunk // passes)
    defines = {
        "NTOK": tokens, "NWG": WARPGROUPS, "CHUNK": c.chunk, "DEPTH": depth,
        "EARLY": min(EARLY_STEPS, depth), "STAGED": staged, "PARTS": c.num_chunks,
        "PATIENCE": PATIENCE,
    }  # fmt: skip
    grid = N // (64 * UNITS) * c.num_chunks
    return _Plan(grid, defines, fixed + staged * 256 * tokens, True)


@cache
def find_plan(T: int, N: int, K: int, groups: int) -> _Plan | None:
    """Up to 16 tokens, while x fits, or where rows are too few or chunks too many for the other,
    blocks in clusters; else one chunk of more rows a block. None where the weight has no whole
    tiles, K is too large or there are more than MAX_ROWS rows.
    """
    c = cut(N, K, groups)
    if c.tiles == 0 or N > MAX_ROWS:
        return None
    tokens = next(n for n in CONFIG if n >= min(T, MAX_TOKENS))
    small = [_cluster_plan(n, N, c) for n in (16, 8) if n <= tokens]
    if tokens <= MOST_CLUSTERED and small[0]:
        return small[0]
    if N // groups % (64 * UNITS) == 0 and c.num_chunks <= MAX_PARTS:
        return _stream_plan(max(tokens, 2 * MOST_CLUSTERED), N, c)
    return next((p for p in small if p), None)


def plan(T: int, N: int, K: int, groups: int) -> _Plan:
    """The plan, for a weight that `takes` takes."""
    p = find_plan(T, N, K, groups)
    if p is None:
        raise KernelUnavailable(
            f"{SPEC.name}: expected groups of whole tiles of 64 rows and 128 columns, at most "
            f"{MAX_ROWS:,} rows, and no more columns than fit in shared memory, "
            f"got [{N}, {K}] in {groups} groups: "
            "call torch.ops.dsv4.linear_fp8"
        )
    return p


@cache
def linear_fp8_kernel(p: _Plan, quant: int, is_e8m0: bool) -> cuda.Source:
    """The source with its constants.

    quant  KEEP, ROUND (x to FP8) or ROUNDED (x is FP8)
    """
    name = "linear_fp8_stream_kernel" if p.is_streamed else "linear_fp8_kernel"
    defines = p.defines | {"QUANT": quant, "E8M0": int(is_e8m0)}
    return cuda.Source.of(Path(__file__).with_suffix(".cu"), name, defines, (DEVICE,))


def sources() -> Iterator[tuple[cuda.Source, str]]:
    """What ahead-of-time compilation builds, and the instruction it must hold."""
    for T in (1, 16, 32, 64):
        for shape in AOT_SHAPES:
            p = plan(T, *shape)
            yield linear_fp8_kernel(p, KEEP, True), "HGMMA" if p.is_streamed else "HMMA"
            yield linear_fp8_kernel(p, ROUND, False), "QGMMA"


def takes(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether there are few tokens, and a plan for the weight."""
    T, (N, K) = x.shape[0], weight.shape
    if not 0 < T <= MAX_TOKENS or groups < 1 or N % groups:
        return False
    return find_plan(T, N, K, groups) is not None


def launch(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int, quantize_input: bool,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill y. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    check(x, weight, scale, groups, quantize_input, out[0])
    multiply(x, None, weight, scale, groups, ROUND if quantize_input else KEEP, out)


def multiply(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, scale: Tensor, groups: int, quant: int,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill y, the first of `out`. x_scale: scales of ROUNDED x."""
    y, partial, counters, *_ = out
    T, (N, K) = x.shape[0], weight.shape
    check_aligned(16, x=x, weight=weight, y=y)
    p = plan(T, N, K, groups)
    source = linear_fp8_kernel(p, quant, scale.dtype == torch.float8_e8m0fnu)
    kernel, step = cuda.load(source, x.device, p.shared), p.defines["NTOK"]
    shared_sums = (partial, counters) if p.is_streamed else ()
    for start in range(0, T, step):
        kernel.launch(
            p.grid, 128 * WARPGROUPS, x[start:], None if x_scale is None else x_scale[start:],
            weight, scale, y[start:], *shared_sums, min(step, T - start), N, K, groups * K,
            cuda.magic(N // groups), overlaps=True,
        )  # fmt: skip


SPEC = KernelSpec("linear_fp8/sm90", launch, arch=(9,), requires=cuda.why_not)
