"""FP8 linears of many tokens on Hopper, CUDA C++ (linear_fp8_prompt_sm90.cu).

The Triton kernel waits for its products in every step of 128 columns, and every program reads all
of its tokens: 300 TFLOP/s on an H200 (8192 tokens, wq_b of V4-Flash), half of what cuBLAS reaches
in BF16. Here a warpgroup decodes while products run, the sums of one are added while the other's
run, and two blocks share the tokens that either fetches. Chunks and the order of sums are those of
the Triton kernel, and so are the bits.
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
from dsv4.kernels.common.linear_plan import BLOCK, NUM_SMS, cut
from dsv4.kernels.linear import linear_fp8
from dsv4.kernels.linear.linear_fp8 import FEW_TOKENS, REFERENCE, check

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "linear_fp8_kernel", "outputs"]

IS_USED = False  # by the op: a candidate until it has been measured
TOKENS = ROWS = 128  # of a tile
THREADS = 384
STAGED = 64  # tokens of a block of the kernel that writes images
SLOTS, IMAGE_BYTES, SUM_BYTES = 5, TOKENS * BLOCK * 2, ROWS * TOKENS * 4
SHARED_BYTES = SLOTS * (IMAGE_BYTES + 16) + SUM_BYTES
# Rows that a group of weights is a multiple of -> blocks that share tokens.
CONFIG = {2 * ROWS: 2, ROWS: 1}
# Costs in steps of 128 columns, 0.7 us: the kernel that adds chunks, and FP32 numbers that are
# written and read.
SUM_STEPS, STEP_NUMBERS = 6, 1 << 18


@dataclass(frozen=True)
class Plan:
    """cluster: blocks that share tokens; parts: 1, or chunks of K, each to blocks of its own."""

    cluster: int
    parts: int


@cache
def plan(T: int, N: int, K: int, groups: int) -> Plan:
    """Chunks become items of their own where whole tiles would leave most SMs idle."""
    c, blocks = cut(N, K, groups), K // BLOCK
    cluster = next(n for rows, n in CONFIG.items() if N // groups % rows == 0)
    tiles, at_once = -(-T // TOKENS) * N // (ROWS * cluster), NUM_SMS // cluster
    whole = -(-tiles // at_once) * blocks
    split = -(-tiles * c.num_chunks // at_once) * c.chunk
    split += SUM_STEPS + T * N * c.num_chunks // STEP_NUMBERS
    return Plan(cluster, c.num_chunks if split < whole else 1)


def linear_fp8_kernel(cluster: int, is_e8m0: bool, name: str = "linear_fp8_kernel") -> cuda.Source:
    """The source with its constants; `name` may be that of the kernel before or after."""
    defines = {"CLUSTER": cluster, "E8M0": int(is_e8m0)}
    return cuda.Source.of(Path(__file__).with_suffix(".cu"), name, defines)


def sources() -> Iterator[tuple[cuda.Source, str]]:
    """What ahead-of-time compilation builds, and the instruction it must hold."""
    for cluster in CONFIG.values():
        for is_e8m0 in (True, False):
            yield linear_fp8_kernel(cluster, is_e8m0), "HGMMA"


def takes(x: Tensor, weight: Tensor, groups: int, quantize_input: bool) -> bool:
    """Whether there are many tokens, kept in BF16, and the weight has whole tiles."""
    (N, K), is_many = weight.shape, x.shape[0] > FEW_TOKENS
    if quantize_input or not is_many or groups < 1 or N % groups or N // groups % ROWS or K % BLOCK:
        return False
    return all(t.data_ptr() % 16 == 0 for t in (x, weight))


def outputs(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int, quantize_input: bool
) -> tuple[Tensor, ...]:
    """Allocate what the Triton kernel needs, and room for the sums of chunks of all tokens."""
    y, partial, *rest = linear_fp8.outputs(x, weight, scale, groups, quantize_input)
    if takes(x, weight, groups, quantize_input):
        T, (N, K) = x.shape[0], weight.shape
        parts = plan(T, N, K, groups).parts
        if parts > 1 and partial.numel() < parts * T * N:
            partial = partial.new_empty(parts * T * N)
    return y, partial, *rest


def launch(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int, quantize_input: bool,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill y. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    y, partial, _, images, _ = out
    T, N, K = check(x, weight, scale, groups, quantize_input, y)
    if not takes(x, weight, groups, quantize_input):
        raise KernelUnavailable(
            f"{SPEC.name}: expected more than {FEW_TOKENS} tokens in BF16, aligned to 16 bytes, "
            f"and groups of whole tiles of {ROWS} rows and {BLOCK} columns, got {T} tokens for "
            f"[{N}, {K}] in {groups} groups: call torch.ops.dsv4.linear_fp8"
        )
    c, p, x_blocks = cut(N, K, groups), plan(T, N, K, groups), groups * K // BLOCK
    is_e8m0 = scale.dtype == torch.float8_e8m0fnu

    # All three, so that what any prompt needs is loaded when the first one was.
    def load(name: str, shared: int = 0) -> cuda.Kernel:
        return cuda.load(linear_fp8_kernel(p.cluster, is_e8m0, name), x.device, shared)

    stage, sums = load("linear_fp8_images_kernel"), load("linear_fp8_sum_kernel")
    product = load("linear_fp8_kernel", SHARED_BYTES)
    tiles = -(-T // TOKENS)
    stage.launch(
        tiles * (TOKENS // STAGED) * x_blocks, 256, x, images, T, x_blocks, overlaps=True
    )  # fmt: skip
    grid = min(tiles * N // ROWS * p.parts, product.num_sms // p.cluster * p.cluster)
    product.launch(
        grid, THREADS, images, weight, scale, y, partial, T, N, K, N // groups, x_blocks, c.chunk,
        p.parts, overlaps=True,
    )  # fmt: skip
    if p.parts > 1:
        count = T * N // 4
        sums.launch(-(-count // 256), 256, partial, y, count, p.parts, overlaps=True)


SPEC = KernelSpec("linear_fp8/sm90_prompt", launch, arch=(9,), requires=cuda.why_not)
