"""FP8 linears of few tokens on Hopper, one launch of CUDA C++ (linear_fp8_sm90.cu).

The Triton kernel waits for shared memory twice in a step of 128 columns and reaches 47 and 59 % of
the read bandwidth (H200, one token, wo_b and wq_b of V4-Flash); this one 69 and 77 %. Nothing in
its loop waits but for the weights, and it asks for the first of them before the kernel in front of
it has ended. Chunks and the order of sums are those of the Triton kernel, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common import cuda
from dsv4.kernels.common.checks import check_aligned
from dsv4.kernels.common.linear_plan import UNITS, Cut, cut
from dsv4.kernels.linear.linear_fp8 import REFERENCE, check, outputs

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "linear_fp8_kernel", "outputs"]

MAX_TOKENS = 64
SHARED_BYTES = 227 << 10
PITCH_BYTES = 68 * 4  # of the sums of one token
# Columns of the matrix instruction -> steps under way at most.
CONFIG = {8: 4, 16: 4, 32: 5, 64: 5}
KEEP, ROUND, ROUNDED = range(3)  # what happens to x
MOST_WARP_MMA = 16  # columns up to which products are those of a warp
WARPGROUPS = 4
STEP_BYTES = WARPGROUPS * 64 * 128
# Whether more than 16 tokens take linear_fp8_stream_kernel, and not the plan before it.
IS_STREAMED = False
# Its steps of weights under way, and those asked for before the kernel in front has ended; columns
# of the matrix instruction -> blocks of x in shared memory; clocks that a block waits for others.
STREAM_DEPTH, EARLY_STEPS, PATIENCE = 5, 3, 30_000
SLOTS = {32: 8, 64: 4}


@dataclass(frozen=True)
class _Plan:
    """One launch: `parts` blocks for `tiles` tiles of 64 rows, and what they need."""

    defines: dict[str, int]
    shared: int
    is_streamed: bool = False


def _plan(tokens: int, tiles: int, chunks: int, c: Cut, cluster: int, wide: bool) -> _Plan | None:
    """None where the tokens of these chunks do not fit in shared memory."""
    blocks = chunks * c.chunk
    fixed = (2 if wide else blocks) * 256 * tokens + (tiles * blocks * 4 + 15) // 16 * 16
    depth = min(CONFIG[tokens], (SHARED_BYTES - fixed) // STEP_BYTES)
    shared = max(fixed + depth * STEP_BYTES, tiles * chunks * tokens * PITCH_BYTES)
    if depth < (2 if tokens <= 16 else 3) or shared > SHARED_BYTES:
        return None
    defines = {
        "NTOK": tokens, "NWG": WARPGROUPS, "RT": tiles, "KW": chunks, "CHUNK": c.chunk,
        "CLUSTER": cluster, "DEPTH": depth, "SPLIT": int(cluster * chunks < c.num_chunks),
        "WIDE": int(wide),
    }  # fmt: skip
    return _Plan(defines, shared)


def _stream_plan(tokens: int, c: Cut) -> _Plan:
    """One chunk of four tiles a block, x through slots."""
    slots = min(SLOTS[tokens], c.chunk)
    fixed = slots * 256 * tokens + c.chunk * 8 + slots * 16 + 8
    depth = min(STREAM_DEPTH, c.chunk, (SHARED_BYTES - fixed) // STEP_BYTES)
    defines = {
        "NTOK": tokens, "NWG": WARPGROUPS, "RT": UNITS, "KW": 1, "CHUNK": c.chunk, "CLUSTER": 1,
        "DEPTH": depth, "EARLY": min(EARLY_STEPS, depth), "SLOTS": slots, "PARTS": c.num_chunks,
        "PATIENCE": PATIENCE, "WIDE": 1,
    }  # fmt: skip
    return _Plan(defines, fixed + depth * STEP_BYTES, True)


@cache
def plan(T: int, N: int, K: int, groups: int, quantize_input: bool) -> _Plan:
    """Blocks in clusters up to 16 tokens, while x fits; else one chunk of more rows a block, and a
    second kernel. There x is staged as a whole where it fits and need not be rounded."""
    c = cut(N, K, groups)
    tokens = next(n for n in CONFIG if n >= min(T, MAX_TOKENS))
    small = [_plan(n, c.tiles, c.chunks, c, c.cluster, False) for n in (16, 8) if n <= tokens]
    if tokens <= 16 and small[0]:
        return small[0]
    if IS_STREAMED and N // groups % (64 * UNITS) == 0:
        return _stream_plan(max(tokens, 32), c)
    if N // groups % (64 * UNITS) == 0:
        order = (True, False) if quantize_input else (False, True)
        found = (_plan(max(tokens, 32), UNITS, 1, c, 1, wide) for wide in order)
        return next(p for p in found if p)
    return next(p for p in small if p)


def linear_fp8_kernel(p: _Plan, quant: int, is_e8m0: bool, name: str = "") -> cuda.Source:
    """The source with its constants; `name` is the second kernel's.

    quant  KEEP, ROUND (x to FP8) or ROUNDED (x is FP8)
    """
    defines = p.defines | {"QUANT": quant, "E8M0": int(is_e8m0)}
    defines["WARP_MMA"] = int(quant == KEEP and p.defines["NTOK"] <= MOST_WARP_MMA)
    name = name or ("linear_fp8_stream_kernel" if p.is_streamed else "linear_fp8_kernel")
    return cuda.Source.of(Path(__file__).with_suffix(".cu"), name, defines)


def sources() -> Iterator[tuple[cuda.Source, str]]:
    """What ahead-of-time compilation builds, and the instruction it must hold."""
    for T in (1, 16, 32, 64):
        for shape in ((4096, 8192, 1), (32768, 1024, 1)):
            p = plan(T, *shape, False)
            product = "HMMA" if p.defines["NTOK"] <= MOST_WARP_MMA else "HGMMA"
            yield linear_fp8_kernel(p, KEEP, True), product
            yield linear_fp8_kernel(plan(T, *shape, True), ROUND, False), "QGMMA"


def takes(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether there are few tokens and the weight has whole tiles."""
    N, K = weight.shape
    is_few = 0 < x.shape[0] <= MAX_TOKENS
    return is_few and groups > 0 and N % groups == 0 and cut(N, K, groups).tiles > 0


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
    c, p = cut(N, K, groups), plan(T, N, K, groups, quant != KEEP)
    is_e8m0 = scale.dtype == torch.float8_e8m0fnu
    kernel = cuda.load(linear_fp8_kernel(p, quant, is_e8m0), x.device, p.shared)
    if p.is_streamed:
        for start in range(0, T, MAX_TOKENS):
            kernel.launch(
                N // 256 * c.num_chunks, 128 * WARPGROUPS, x[start:],
                None if x_scale is None else x_scale[start:], weight, scale, y[start:], partial,
                counters, min(MAX_TOKENS, T - start), N, K, groups * K, N // groups, overlaps=True,
            )  # fmt: skip
        return
    is_split, tokens = p.defines["SPLIT"], p.defines["NTOK"]
    parts = c.num_chunks if is_split else p.defines["CLUSTER"]
    grid = N // (64 * p.defines["RT"]) * parts
    for start in range(0, T, tokens):
        count = min(tokens, T - start)
        kernel.launch(
            grid, 128 * WARPGROUPS, x[start:], None if x_scale is None else x_scale[start:],
            weight, scale, y[start:], partial, count, N, K, groups * K, N // groups, parts,
            overlaps=True,
        )  # fmt: skip
        if is_split:
            source = linear_fp8_kernel(p, quant, is_e8m0, "linear_fp8_sum_kernel")
            sums = cuda.load(source, x.device, 0)
            quads = count * N // 4
            sums.launch(-(-quads // 256), 256, partial, y[start:], quads, parts, overlaps=True)


SPEC = KernelSpec("linear_fp8/sm90", launch, arch=(9,), requires=cuda.why_not)
