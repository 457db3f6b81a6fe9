"""BF16 weights times BF16 activations, result FP32: compressors, gate, index weights. Triton.

Chunks of K that depend on the weight alone, added in order, and therefore the same promise as
`linear_fp8`: a row gets the same bits in any batch. cuBLAS does not give that: it picks its kernel
and its split by the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.fragments import mma
from dsv4.kernels.common.launch import INTERPRETED
from dsv4.kernels.common.linear_plan import tile_plan, wide_cut
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.split import arrival_counters, is_last_arrival, sum_in_order

REFERENCE = "dsv4.reference.linear:wide_linear"
BLOCK = tl.constexpr(128)
# Up to so many tokens -> tile.
CONFIG = {
    16: {"BM": 16, "BN": 64, "num_warps": 4, "STAGES": 5},
    32: {"BM": 32, "BN": 64, "num_warps": 4, "STAGES": 5},
    64: {"BM": 64, "BN": 64, "num_warps": 4, "STAGES": 4},
    1 << 40: {"BM": 128, "BN": 128, "num_warps": 8, "STAGES": 3},
}


@triton.jit
def sum_chunks(
    x_ptr, weight_ptr, row, token, T, N, K, chunk, last_chunk, num_chunks,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """FP32 [BN, BM]: chunks up to last_chunk - 1, each a sum on its own, added in order.

    One loop over all their blocks, so that loads run ahead across the ends of chunks.
    """
    num_blocks = (K + BLOCK - 1) // BLOCK
    k = tl.arange(0, BLOCK)
    w_at = weight_ptr + row[:, None].to(tl.int64) * K + k[None, :]
    x_at = x_ptr + token[:, None].to(tl.int64) * K + k[None, :]
    first, last = chunk * num_blocks // num_chunks, last_chunk * num_blocks // num_chunks
    end = (chunk + 1) * num_blocks // num_chunks
    total, part = tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        at = block * BLOCK
        live = (k < K - at)[None, :]
        w = tl.load(w_at + at, live & (row < N)[:, None], 0.0)
        x = tl.load(x_at + at, live & (token < T)[:, None], 0.0)
        part = mma(w, tl.trans(x), part)
        if block + 1 == end:
            total += part
            part = tl.zeros([BN, BM], tl.float32)
            chunk += 1
            end = (chunk + 1) * num_blocks // num_chunks
    return total


@triton.jit(do_not_specialize=["T"])
def wide_linear_kernel(
    x_ptr, weight_ptr, y_ptr, partial_ptr, counter_ptr, T, N, K, num_chunks,
    IS_SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    tile, part = tl.program_id(0), tl.program_id(1)
    token = tl.program_id(2) * BM + tl.arange(0, BM)
    row = tile * BN + tl.arange(0, BN)
    y_at = y_ptr + token[None, :].to(tl.int64) * N + row[:, None]
    y_live = (token < T)[None, :] & (row < N)[:, None]
    last = part + 1 if IS_SPLIT else num_chunks
    total = sum_chunks(
        x_ptr, weight_ptr, row, token, T, N, K, part, last, num_chunks, BM, BN, STAGES
    )
    if IS_SPLIT:
        tile_index = (tl.program_id(2) * tl.num_programs(0) + tile).to(tl.int64)
        partial_ptr += tile_index * num_chunks * (BM * BN)
        offset = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(partial_ptr + part * (BM * BN) + offset, total)
        if is_last_arrival(counter_ptr + tile_index, num_chunks):
            tl.store(y_at, sum_in_order(partial_ptr, offset, BM * BN, num_chunks), y_live)
    else:
        tl.store(y_at, total, y_live)


def result(x: Tensor, weight: Tensor) -> Tensor:
    """Allocate y [T, N] FP32: the op's fake."""
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


def outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate y [T, N] FP32, and what programs of one tile share: partial sums and counters."""
    (N, K), T, y = weight.shape, x.shape[0], result(x, weight)
    if T == 0:
        return y, y.new_empty(0), y.new_empty(0, dtype=torch.int32)
    num_chunks = wide_cut(N, K).num_chunks
    p = tile_plan(CONFIG, T, N, 1, num_chunks)
    tiles = p.grid[0] * p.grid[2] if p.is_split else 0
    partial = y.new_empty(tiles * num_chunks * p.tile["BM"] * p.tile["BN"])
    return y, partial, arrival_counters(x.device, max(tiles, 1))


def check(x: Tensor, weight: Tensor, y: Tensor) -> tuple[int, int, int]:
    """Check the arguments; -> T, N, K."""
    sizes = check_tensors(
        x=(x, "T K", torch.bfloat16),
        weight=(weight, "N K", torch.bfloat16),
        y=(y, "T N", torch.float32),
    )
    return sizes["T"], sizes["N"], sizes["K"]


def launch(x: Tensor, weight: Tensor, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Fill y. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    y, partial, counters = out
    T, N, K = check(x, weight, y)
    if T == 0:
        return
    num_chunks = wide_cut(N, K).num_chunks
    p = tile_plan(CONFIG, T, N, 1, num_chunks)
    wide_linear_kernel[p.grid](
        x, weight, y, partial, counters, T, N, K, num_chunks, IS_SPLIT=p.is_split, **p.tile, **PDL
    )


def tensor_core(arch: int, args: dict[str, object]) -> str | None:
    """The instruction that the compiled code must hold."""
    return r"wgmma\.mma_async" if arch == 90 else None


SPEC = KernelSpec("wide_linear/triton", launch, runs_on_cpu=INTERPRETED)
