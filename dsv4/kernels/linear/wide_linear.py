"""BF16 weights times BF16 activations, result FP32: compressors, gate, index weights. Triton.

Same chunks, same order of sums and therefore the same promise as `linear_fp8`: a row gets the same
bits in any batch. cuBLAS does not give that: it picks its kernel and its split by the batch.
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
from dsv4.kernels.common.linear_plan import cut, tile_plan
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
def chunk_sum(
    x_ptr, weight_ptr, row, token, T, N, K, first, last,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """FP32 [BN, BM] sum over the blocks first .. last - 1."""
    k = tl.arange(0, BLOCK)
    w_at = weight_ptr + row[:, None].to(tl.int64) * K + k[None, :]
    x_at = x_ptr + token[:, None].to(tl.int64) * K + k[None, :]
    total = tl.zeros([BN, BM], tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        at = block * BLOCK
        live = (k < K - at)[None, :]
        w = tl.load(w_at + at, live & (row < N)[:, None], 0.0)
        x = tl.load(x_at + at, live & (token < T)[:, None], 0.0)
        total = mma(w, tl.trans(x), total)
    return total


@triton.jit
def wide_linear_kernel(
    x_ptr, weight_ptr, y_ptr, partial_ptr, counter_ptr, T, N, K, chunk, num_chunks,
    IS_SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(1)
    token = tl.program_id(2) * BM + tl.arange(0, BM)
    row = tile * BN + tl.arange(0, BN)
    num_blocks = (K + BLOCK - 1) // BLOCK
    y_at = y_ptr + token[None, :].to(tl.int64) * N + row[:, None]
    y_live = (token < T)[None, :] & (row < N)[:, None]
    if IS_SPLIT:
        last = tl.minimum(part * chunk + chunk, num_blocks)
        total = chunk_sum(
            x_ptr, weight_ptr, row, token, T, N, K, part * chunk, last, BM, BN, STAGES
        )
        tile_index = (tl.program_id(2) * tl.num_programs(0) + tile).to(tl.int64)
        partial_ptr += tile_index * num_chunks * (BM * BN)
        offset = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(partial_ptr + part * (BM * BN) + offset, total)
        if is_last_arrival(counter_ptr + tile_index, num_chunks):
            tl.store(y_at, sum_in_order(partial_ptr, offset, BM * BN, num_chunks), y_live)
    else:
        last = tl.minimum(chunk, num_blocks)
        total = chunk_sum(x_ptr, weight_ptr, row, token, T, N, K, 0, last, BM, BN, STAGES)
        for c in tl.range(1, num_chunks, num_stages=1):
            last = tl.minimum(c * chunk + chunk, num_blocks)
            total += chunk_sum(
                x_ptr, weight_ptr, row, token, T, N, K, c * chunk, last, BM, BN, STAGES
            )
        tl.store(y_at, total, y_live)


def result(x: Tensor, weight: Tensor) -> Tensor:
    """Allocate y [T, N] FP32: the op's fake."""
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


def outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate y [T, N] FP32, and what programs of one tile share: partial sums and counters."""
    (N, K), T, y = weight.shape, x.shape[0], result(x, weight)
    if T == 0:
        return y, y.new_empty(0), y.new_empty(0, dtype=torch.int32)
    num_chunks = cut(N, K).num_chunks
    p = tile_plan(CONFIG, T, N, 1, num_chunks)
    tiles = p.grid[0] * p.grid[2] if p.is_split else 0
    partial = y.new_empty(tiles * num_chunks * p.tile["BM"] * p.tile["BN"])
    return y, partial, arrival_counters(x.device, max(tiles, 1))


def launch(x: Tensor, weight: Tensor, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Fill y. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    y, partial, counters = out
    sizes = check_tensors(
        x=(x, "T K", torch.bfloat16),
        weight=(weight, "N K", torch.bfloat16),
        y=(y, "T N", torch.float32),
    )
    T, N, K = sizes["T"], sizes["N"], sizes["K"]
    if T == 0:
        return
    c = cut(N, K)
    p = tile_plan(CONFIG, T, N, 1, c.num_chunks)
    wide_linear_kernel[p.grid](
        x, weight, y, partial, counters, T, N, K, c.chunk, c.num_chunks, IS_SPLIT=p.is_split,
        **p.tile,
    )  # fmt: skip


def tensor_core(arch: int, args: dict[str, object]) -> str | None:
    """The instruction that the compiled code must hold."""
    return r"wgmma\.mma_async" if arch == 90 else None


SPEC = KernelSpec("wide_linear/triton", launch, runs_on_cpu=INTERPRETED)
