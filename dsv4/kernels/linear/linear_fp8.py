"""FP8 block-scaled weights times BF16 activations, exactly, for any number of tokens. Triton.

The weights are the rows of the matrix unit's A operand: decoded in registers, so that they pass
through no shared memory but the ring of asynchronous copies, and the tokens are its columns. K is
cut into a fixed number of chunks that depends on the weight alone. A chunk is the FP32 sum of its
blocks of 128, each block times its scale; an output is the sum of its chunks from the first to the
last. Few tokens: one program a chunk, and the last to arrive adds the chunks. Many tokens: one
program for all chunks. Either way a row gets the same bits in any batch.

The order of columns in a product is that of weights as they are loaded. Tokens are put into it on
their way through registers, or, where many programs read the same ones, by a kernel before: then
the matrix unit reads them from where the asynchronous copy has put them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import e8m0_value, narrow
from dsv4.kernels.common.checks import check_int
from dsv4.kernels.common.fragments import (
    SPAN,
    decode_e4m3,
    fp8_fragment,
    fp8_input,
    fragment_rows,
    input_fragment,
    mma,
    quantize_fp8_pair,
    weight_fragment,
)
from dsv4.kernels.common.launch import INTERPRETED
from dsv4.kernels.common.linear_plan import check_scale, cut, tile_plan
from dsv4.kernels.common.split import arrival_counters, is_last_arrival, sum_in_order

REFERENCE = "dsv4.reference.linear:linear_fp8"
BLOCK = tl.constexpr(128)
# Up to so many tokens -> tile.
CONFIG = {
    16: {"BM": 16, "BN": 64, "num_warps": 4, "STAGES": 4},
    32: {"BM": 32, "BN": 64, "num_warps": 4, "STAGES": 4},
    64: {"BM": 64, "BN": 128, "num_warps": 4, "STAGES": 3},
    1 << 40: {"BM": 128, "BN": 128, "num_warps": 8, "STAGES": 3},
}
FEW_TOKENS = 64  # beyond, a kernel before puts the columns of tokens in order
STAGE = {"BM": 32, "num_warps": 4}
PRODUCTS = {"linear_fp8_kernel"}  # device functions that use the matrix unit


@triton.jit
def _load_scale(scale_ptr, row, block, num_blocks, live, IS_E8M0: tl.constexpr):
    raw = tl.load(scale_ptr + (row // BLOCK) * num_blocks + block, live, 0)
    return e8m0_value(raw.to(tl.int32)) if IS_E8M0 else raw


@triton.jit(do_not_specialize=["M"])
def stage_tokens_kernel(
    x_ptr, given_ptr, staged_ptr, scale_ptr, M, columns, QUANT: tl.constexpr, BM: tl.constexpr
):
    """Write a block of 128 columns in the order of products, FP8 with FP32 scales if QUANT.

    FP8 x has its scales, as bytes, at given_ptr.
    """
    token, block = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    live = (token < M)[:, None]
    at = token[:, None].to(tl.int64) * columns + block * BLOCK + tl.arange(0, SPAN)[None, :]
    x0 = tl.load(x_ptr + at, live, 0.0)
    x1 = tl.load(x_ptr + at + SPAN, live, 0.0)
    if QUANT:
        scale_at = token.to(tl.int64) * (columns // BLOCK) + block
        if x0.dtype == tl.bfloat16:
            x0, x1, scale = quantize_fp8_pair(x0, x1)
        else:
            scale = e8m0_value(tl.load(given_ptr + scale_at, token < M, 0).to(tl.int32))
        tl.store(scale_ptr + scale_at, scale, token < M)
        y0, y1 = fp8_input(x0, BM), fp8_input(x1, BM)
    else:
        y0, y1 = input_fragment(x0, BM), input_fragment(x1, BM)
    tl.store(staged_ptr + at, y0, live)
    tl.store(staged_ptr + at + SPAN, y1, live)


@triton.jit
def _chunk_sum(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, row, scale_row, token, M, N, K, x_stride, first,
    last,
    STAGED: tl.constexpr, QUANT: tl.constexpr, IS_E8M0: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, NUM_WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """FP32 [BN, BM] sum over the blocks first .. last - 1; rows in fragment order."""
    k = tl.arange(0, SPAN)
    w_at = weight_ptr + row[:, None].to(tl.int64) * K + k[None, :]
    x_at = x_ptr + token[:, None].to(tl.int64) * x_stride + k[None, :]
    w_live, x_live = (row < N)[:, None], (token < M)[:, None]
    num_blocks = (K + BLOCK - 1) // BLOCK
    total = tl.zeros([BN, BM], tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        at = block * BLOCK
        if EVEN_K:
            w0_live, w1_live, x0_live, x1_live = w_live, w_live, x_live, x_live
        else:
            k0, k1 = (k < K - at)[None, :], (k < K - at - SPAN)[None, :]
            w0_live, w1_live, x0_live, x1_live = w_live & k0, w_live & k1, x_live & k0, x_live & k1
        w0 = tl.load(w_at + at, w0_live, 0)
        w1 = tl.load(w_at + at + SPAN, w1_live, 0)
        x0 = tl.load(x_at + at, x0_live, 0.0)
        x1 = tl.load(x_at + at + SPAN, x1_live, 0.0)
        scale = _load_scale(scale_ptr, scale_row, block, num_blocks, scale_row < N, IS_E8M0)
        zero = tl.zeros([BN, BM], tl.float32)
        if QUANT:
            if x0.dtype == tl.bfloat16:
                x0, x1, x_scale = quantize_fp8_pair(x0, x1)
            else:
                x_scale = tl.load(x_scale_ptr + token * (x_stride // BLOCK) + block, token < M, 0)
                if x_scale.dtype == tl.uint8:
                    x_scale = e8m0_value(x_scale.to(tl.int32))
            if not STAGED:
                x0, x1 = fp8_input(x0, BM), fp8_input(x1, BM)
            a0, a1 = fp8_fragment(w0, BN, NUM_WARPS), fp8_fragment(w1, BN, NUM_WARPS)
            scale_NM = scale[:, None] * x_scale[None, :]
        else:
            if not STAGED:
                x0, x1 = input_fragment(x0, BM), input_fragment(x1, BM)
            a0 = weight_fragment(decode_e4m3(w0), BN, NUM_WARPS)
            a1 = weight_fragment(decode_e4m3(w1), BN, NUM_WARPS)
            scale_NM = tl.broadcast_to(scale[:, None], [BN, BM])
        part = mma(a1, tl.trans(x1), mma(a0, tl.trans(x0), zero))
        total = tl.fma(part, scale_NM, total)
    return total


@triton.jit(do_not_specialize=["M", "tiles_per_group", "num_chunks"])
def linear_fp8_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, y_ptr, partial_ptr, counter_ptr, M, N, K,
    group_rows, tiles_per_group, chunk, num_chunks, x_stride,
    IS_SPLIT: tl.constexpr, STAGED: tl.constexpr, QUANT: tl.constexpr, IS_E8M0: tl.constexpr,
    EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NUM_WARPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(1)
    group = tile // tiles_per_group
    first_row = group * group_rows + (tile % tiles_per_group) * BN
    end_row = tl.minimum((group + 1) * group_rows, N)
    token = tl.program_id(2) * BM + tl.arange(0, BM)
    row = first_row + tl.arange(0, BN)
    out_row = first_row + fragment_rows(BN, NUM_WARPS)
    num_blocks = (K + BLOCK - 1) // BLOCK
    x_ptr += group * K
    x_scale_ptr += group * (K // BLOCK)
    y_at = y_ptr + token[None, :].to(tl.int64) * N + out_row[:, None]
    y_live = (token < M)[None, :] & (out_row < end_row)[:, None]
    if IS_SPLIT:
        first = part * chunk
        total = _chunk_sum(
            x_ptr, x_scale_ptr, weight_ptr, scale_ptr, row, out_row, token, M, end_row, K,
            x_stride, first, tl.minimum(first + chunk, num_blocks), STAGED, QUANT, IS_E8M0, EVEN_K,
            BM, BN, NUM_WARPS, STAGES,
        )  # fmt: skip
        tile_index = (tl.program_id(2) * tl.num_programs(0) + tile).to(tl.int64)
        partial_ptr += tile_index * num_chunks * (BM * BN)
        offset = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(partial_ptr + part * (BM * BN) + offset, total)
        if is_last_arrival(counter_ptr + tile_index, num_chunks):
            y = sum_in_order(partial_ptr, offset, BM * BN, num_chunks)
            tl.store(y_at, narrow(y, True), y_live)
    else:
        total = _chunk_sum(
            x_ptr, x_scale_ptr, weight_ptr, scale_ptr, row, out_row, token, M, end_row, K,
            x_stride, 0, tl.minimum(chunk, num_blocks), STAGED, QUANT, IS_E8M0, EVEN_K, BM, BN,
            NUM_WARPS, STAGES,
        )  # fmt: skip
        for c in tl.range(1, num_chunks, num_stages=1):
            total += _chunk_sum(
                x_ptr, x_scale_ptr, weight_ptr, scale_ptr, row, out_row, token, M, end_row, K,
                x_stride, c * chunk, tl.minimum(c * chunk + chunk, num_blocks), STAGED, QUANT,
                IS_E8M0, EVEN_K, BM, BN, NUM_WARPS, STAGES,
            )  # fmt: skip
        tl.store(y_at, narrow(total, True), y_live)


def result(x: Tensor, weight: Tensor, scale: Tensor, groups: int, quantize_input: bool) -> Tensor:
    """Allocate y [T, N] BF16: the op's fake."""
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)


def _is_staged(T: int, K: int) -> bool:
    return T > FEW_TOKENS and K % 128 == 0


def outputs(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int, quantize_input: bool
) -> tuple[Tensor, ...]:
    """Allocate y [T, N] BF16; what programs of one tile share, partial sums and counters; and
    tokens with their columns in order, with their scales if they are rounded."""
    check_int("groups", groups)
    T, N, K = x.shape[0], weight.shape[0], weight.shape[1]
    y = result(x, weight, scale, groups, quantize_input)
    staged, staged_scale = x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    if _is_staged(T, K):
        dtype = torch.float8_e4m3fn if quantize_input else x.dtype
        staged = torch.empty_like(x, dtype=dtype)
        staged_scale = staged_scale.new_empty(T * groups * K // 128 if quantize_input else 0)
    if T == 0:
        none = x.new_empty(0, dtype=torch.int32)
        return y, x.new_empty(0, dtype=torch.float32), none, staged, staged_scale
    num_chunks = cut(N, K, groups).num_chunks
    p = tile_plan(CONFIG, T, N, groups, num_chunks)
    tiles = p.grid[0] * p.grid[2]
    size = tiles * num_chunks * p.tile["BM"] * p.tile["BN"] if p.is_split else 0
    if T <= FEW_TOKENS:  # for kernels of few tokens, in whole groups of eight
        size = max(size, num_chunks * N * min(T + 7, FEW_TOKENS))
    partial = x.new_empty(size, dtype=torch.float32)
    # For kernels of few tokens: eight bytes for 256 rows, and four that align them.
    counters = arrival_counters(x.device, max(tiles if p.is_split else 0, N // 128 + 1))
    return y, partial, counters, staged, staged_scale


def check(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int, quantize_input: bool, y: Tensor,
    x_scale: Tensor | None = None,
) -> tuple[int, int, int]:  # fmt: skip
    """Check the arguments; -> T, N, K. x is FP8 if it has scales."""
    check_int("groups", groups)
    given = {} if x_scale is None else {"x_scale": (x_scale, "T x_blocks", torch.float8_e8m0fnu)}
    sizes = check_tensors(
        x=(x, "T GK", torch.bfloat16 if x_scale is None else torch.float8_e4m3fn),
        weight=(weight, "N K", torch.float8_e4m3fn),
        scale=(scale, "rows blocks", scale.dtype),
        y=(y, "T N", torch.bfloat16),
        **given,
    )
    N, K = sizes["N"], sizes["K"]
    check_scale("scale", scale, N, K)
    if N % groups:
        raise ValueError(f"groups: expected a divisor of the {N} rows of weight, got {groups}")
    if sizes["GK"] != groups * K:
        raise ValueError(f"x: expected shape [T, {groups * K}], got {list(x.shape)}")
    if quantize_input and K % 128:
        raise ValueError(f"weight: expected columns in whole groups of 128, got {K}")
    if x_scale is not None and x_scale.shape[1] != groups * K // 128:
        want = [sizes["T"], groups * K // 128]
        raise ValueError(f"x_scale: expected shape {want}, got {list(x_scale.shape)}")
    return sizes["T"], N, K


def launch(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int, quantize_input: bool,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill y. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    check(x, weight, scale, groups, quantize_input, out[0])
    multiply(x, None, weight, scale, groups, quantize_input, out)


def multiply(
    x: Tensor, given: Tensor | None, weight: Tensor, scale: Tensor, groups: int, is_w8a8: bool,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill y, the first of `out`. given: the scales, as bytes, of x that is FP8."""
    y, partial, counters, staged, x_scale = out
    given = x_scale if given is None else given
    T, (N, K) = x.shape[0], weight.shape
    if T == 0:
        return
    c = cut(N, K, groups)
    p = tile_plan(CONFIG, T, N, groups, c.num_chunks)
    is_e8m0 = scale.dtype == torch.float8_e8m0fnu
    tile = {k: v for k, v in p.tile.items() if k != "num_warps"}
    is_staged = _is_staged(T, K)
    if is_staged:
        grid = triton.cdiv(T, STAGE["BM"]), groups * K // 128
        stage_tokens_kernel[grid](
            x, given, staged, x_scale, T, groups * K, QUANT=is_w8a8, **STAGE
        )  # fmt: skip
    linear_fp8_kernel[p.grid](
        *((staged, x_scale) if is_staged else (x, given)), weight.view(torch.uint8),
        scale.view(torch.uint8) if is_e8m0 else scale, y, partial, counters, T, N, K, N // groups,
        p.tiles_per_group, c.chunk, c.num_chunks, groups * K,
        IS_SPLIT=p.is_split, STAGED=is_staged, QUANT=is_w8a8, IS_E8M0=is_e8m0,
        EVEN_K=K % 128 == 0, NUM_WARPS=p.tile["num_warps"], num_warps=p.tile["num_warps"], **tile,
    )  # fmt: skip


def tensor_core(arch: int, args: dict[str, object]) -> str | None:
    """The instruction that the compiled code must hold."""
    return r"wgmma\.mma_async" if arch == 90 else None


SPEC = KernelSpec("linear_fp8/triton", launch, runs_on_cpu=INTERPRETED)
