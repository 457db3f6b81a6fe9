"""BF16 weights with FP32 results for few tokens on Hopper, one launch of CUDA C++.

A weight that is read once is a matter of having all of it on its way: nearly every byte of an SM's
share fits in its shared memory, so it is asked for before the kernel in front has ended, and what
is left after that is x, the products and the sum of a cluster. Chunks and the order of sums are
those of the Triton kernel, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import triton
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.core.errors import KernelUnavailable
from dsv4.kernels.common import cuda
from dsv4.kernels.common.checks import check_aligned
from dsv4.kernels.common.linear_device import DEVICE
from dsv4.kernels.common.linear_plan import WIDE_CHUNKS, wide_cut
from dsv4.kernels.linear.wide_linear import REFERENCE, check, outputs

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "outputs", "wide_linear_kernel"]

MAX_TOKENS = 64
SHARED_BYTES = 227 << 10
# Weights under way in a block, for up to 8 tokens: it then starts beside two blocks of
# mhc_post_pre_few_sm90.
FEW_WEIGHT_BYTES = 128 << 10
THREADS = 128 * WIDE_CHUNKS
PITCH_BYTES = 68 * 4  # of the sums of one token
PUSH_TOKENS = 16  # the sums of more leave too little room for weights
# Columns of the matrix instruction -> steps of 64 columns that must be under way, or all there are,
# for x to be staged as a whole.
CONFIG = {8: 4, 16: 4, 32: 4, 64: 4}


@dataclass(frozen=True)
class Plan:
    """One launch: its constants, its blocks, and the shared memory of one."""

    defines: Mapping[str, int]
    grid: int
    shared: int


@cache
def plan(T: int, N: int, K: int) -> Plan:
    """As many steps under way as fit in shared memory."""
    c = wide_cut(N, K)
    firsts = [c.first_block(i, K) for i in range(c.num_chunks + 1)]
    blocks = max(b - a for a, b in pairwise(firsts[::WIDE_CHUNKS]))
    steps = 2 * max(b - a for a, b in pairwise(firsts))
    tokens = next(n for n in CONFIG if n >= T)
    x_bytes, step_bytes, x_step_bytes = blocks * 256 * tokens, c.rows * 512, tokens * 512
    # What the blocks of a cluster send each other, and the barrier that counts it.
    is_push = c.cluster > 1 and tokens <= PUSH_TOKENS
    sent = c.num_chunks * triton.cdiv(tokens, c.cluster) * c.rows * 4 + 16 if is_push else 0
    depth = min(steps, (SHARED_BYTES - sent - x_bytes) // step_bytes)
    if tokens == 8:
        depth = min(depth, FEW_WEIGHT_BYTES // step_bytes)
    is_ring = depth < min(steps, CONFIG[tokens])
    if is_ring:
        x_bytes, step_bytes = 0, step_bytes + x_step_bytes
        depth = min(steps, (SHARED_BYTES - sent) // step_bytes)
    defines = {
        "NTOK": tokens, "ROWS": c.rows, "CLUSTER": c.cluster, "BLOCKS": blocks, "DEPTH": depth,
        "RING": int(is_ring), "PUSH": int(is_push),
    }  # fmt: skip
    sums = 0 if is_push else WIDE_CHUNKS * tokens * PITCH_BYTES  # over x and weights
    shared = max(x_bytes + depth * step_bytes + sent, sums)
    return Plan(defines, triton.cdiv(N, c.rows) * c.cluster, shared)


def wide_linear_kernel(p: Plan, is_joined: bool = False) -> cuda.Source:
    """The source with its constants; joined, that of `joined_wide_linear`."""
    name = "joined_wide_linear_kernel" if is_joined else "wide_linear_kernel"
    path = Path(__file__).with_suffix(".cu")
    return cuda.Source.of(path, name, {**p.defines, "JOINED": int(is_joined)}, (DEVICE,))


def sources(is_joined: bool = False) -> Iterator[tuple[cuda.Source, str]]:
    """What ahead-of-time compilation builds, and the instruction it must hold."""
    for T in (1, 16, 32, 64):
        for N in (160, 2624) if is_joined else (160, 256, 2048):
            yield wide_linear_kernel(plan(T, N, 4096), is_joined), "HGMMA"


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether there are few tokens and the weight has whole blocks and few rows."""
    return 0 < x.shape[0] <= MAX_TOKENS and wide_cut(*weight.shape).cluster > 0


def start(x: Tensor, weight: Tensor, y: Tensor, *joined: Tensor | int) -> None:
    """Launch on checked arguments; `joined` is what the joined kernel takes besides."""
    check_aligned(16, x=x, weight=weight)
    (N, K), T = weight.shape, x.shape[0]
    if T > MAX_TOKENS:
        raise KernelUnavailable(f"{SPEC.name}: at most {MAX_TOKENS} tokens, got {T}")
    p = plan(T, N, K)
    kernel = cuda.load(wide_linear_kernel(p, bool(joined)), x.device, p.shared)
    kernel.launch(p.grid, THREADS, x, weight, y, T, N, K, *joined, overlaps=True)


def launch(x: Tensor, weight: Tensor, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Fill y. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    y, _, _ = out
    check(x, weight, y)
    start(x, weight, y)


SPEC = KernelSpec("wide_linear/sm90", launch, arch=(9,), requires=cuda.why_not)
