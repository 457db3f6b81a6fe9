"""FP8 linears of many tokens on Hopper, CUDA C++ (linear_fp8_prompt_sm90.cu).

A kernel writes tokens as images of the matrix unit's shared memory; the next one has a block for
each SM, which copies images into a ring and goes from tile to tile. Its two warpgroups decode
weights while products run, and each scales its sums while the products of the other run. Where
tiles would leave most SMs idle, chunks are blocks' work, and a third kernel adds them. Chunks and
the order of sums are those of the Triton kernel, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.core.errors import KernelUnavailable
from dsv4.kernels.common import cuda
from dsv4.kernels.common.checks import check_aligned
from dsv4.kernels.common.linear_device import DEVICE
from dsv4.kernels.common.linear_plan import BLOCK, NUM_SMS, cut
from dsv4.kernels.linear import linear_fp8
from dsv4.kernels.linear.linear_fp8 import FEW_TOKENS, REFERENCE, check

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "linear_fp8_kernel", "outputs"]

TOKENS = ROWS = 128  # of a tile
STAGED = 64  # tokens of a block of the kernel that writes images
SLOTS, IMAGE_BYTES, SUM_BYTES = 5, TOKENS * BLOCK * 2, ROWS * TOKENS * 4
CONFIG = {"threads": 384, "shared_bytes": SLOTS * (IMAGE_BYTES + 16) + SUM_BYTES}
# Costs in steps of 128 columns, about 1 us: what a tile costs beside its steps, and the FP32
# numbers that are written and read in one. Fitted to what docs/performance/linear.md has measured.
TILE_STEPS, STEP_NUMBERS = 1.5, 1 << 19


@cache
def num_parts(T: int, N: int, K: int, groups: int) -> int:
    """1, or the number of chunks of K where a block does one of a tile, not all."""
    c, tiles = cut(N, K, groups), -(-T // TOKENS) * N // ROWS
    whole = -(-tiles // NUM_SMS) * (K // BLOCK + TILE_STEPS)
    split = -(-tiles * c.num_chunks // NUM_SMS) * (c.chunk + TILE_STEPS)
    split += T * N * c.num_chunks / STEP_NUMBERS
    return c.num_chunks if split < whole else 1


@cache
def linear_fp8_kernel(is_e8m0: bool, name: str = "linear_fp8_kernel") -> cuda.Source:
    """The source for a dtype of scales; `name` may be that of the kernel before or after."""
    defines = {
        "E8M0": int(is_e8m0), "SLOTS": SLOTS, "STAGED": STAGED,
        "SHARED_BYTES": CONFIG["shared_bytes"],
    }  # fmt: skip
    return cuda.Source.of(Path(__file__).with_suffix(".cu"), name, defines, (DEVICE,))


def sources() -> Iterator[tuple[cuda.Source, str]]:
    """What ahead-of-time compilation builds, and the instruction it must hold."""
    for is_e8m0 in (True, False):
        yield linear_fp8_kernel(is_e8m0), "HGMMA"


def takes(x: Tensor, weight: Tensor, groups: int, quantize_input: bool) -> bool:
    """Whether there are many tokens, kept in BF16, and the weight has whole tiles."""
    (N, K), is_many = weight.shape, x.shape[0] > FEW_TOKENS
    if quantize_input or not is_many or groups < 1 or N % groups or N // groups % ROWS or K % BLOCK:
        return False
    return all(t.data_ptr() % 16 == 0 for t in (x, weight))


def outputs(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int, quantize_input: bool
) -> tuple[Tensor, ...]:
    """Allocate y [T, N] BF16; images of the tokens, in whole tiles; and sums of chunks, if they are
    apart."""
    T, (N, K) = x.shape[0], weight.shape
    images = x.new_empty(-(-T // TOKENS) * TOKENS, groups * K)
    parts = num_parts(T, N, K, groups)
    partial = x.new_empty(parts * T * N if parts > 1 else 0, dtype=torch.float32)
    return linear_fp8.result(x, weight, scale, groups, quantize_input), images, partial


def launch(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int, quantize_input: bool,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill y. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    y, images, partial = out
    T, N, K = check(x, weight, scale, groups, quantize_input, y)
    if not takes(x, weight, groups, quantize_input):
        raise KernelUnavailable(
            f"{SPEC.name}: expected more than {FEW_TOKENS} tokens in BF16, aligned to 16 bytes, "
            f"and groups of whole tiles of {ROWS} rows and {BLOCK} columns, got {T} tokens for "
            f"[{N}, {K}] in {groups} groups: call torch.ops.dsv4.linear_fp8"
        )
    check_aligned(16, y=y, images=images, partial=partial)
    parts, x_blocks, tiles = num_parts(T, N, K, groups), groups * K // BLOCK, -(-T // TOKENS)
    is_e8m0 = scale.dtype == torch.float8_e8m0fnu

    # All three, whatever T needs: a step of any size must find them loaded after the first.
    def load(name: str, shared: int = 0) -> cuda.Kernel:
        return cuda.load(linear_fp8_kernel(is_e8m0, name), x.device, shared)

    stage, add = load("linear_fp8_images_kernel"), load("linear_fp8_sum_kernel")
    product = load("linear_fp8_kernel", CONFIG["shared_bytes"])
    stage.launch(
        tiles * (TOKENS // STAGED) * x_blocks, 256, x, images, T, x_blocks, overlaps=True
    )  # fmt: skip
    product.launch(
        min(tiles * N // ROWS * parts, product.num_sms), CONFIG["threads"], images, weight, scale,
        y, partial, T, N, K, N // groups, x_blocks, cut(N, K, groups).chunk, parts, overlaps=True,
    )  # fmt: skip
    if parts > 1:
        count = T * N // 4
        add.launch(-(-count // 256), 256, partial, y, count, parts, overlaps=True)


SPEC = KernelSpec("linear_fp8/sm90_prompt", launch, arch=(9,), requires=cuda.why_not)
