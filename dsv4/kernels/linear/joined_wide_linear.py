"""Several BF16 weights times one input in one launch, with a bias by position. Triton.

The products are those of `wide_linear`; an output tile is spread over the parts it belongs to,
each of which lies on its own, so that what follows reads plain matrices.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.checks import check_int
from dsv4.kernels.common.launch import INTERPRETED
from dsv4.kernels.common.linear_plan import tile_plan, wide_cut
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.split import is_last_arrival, sum_in_order
from dsv4.kernels.linear import wide_linear
from dsv4.kernels.linear.wide_linear import CONFIG, sum_chunks
from dsv4.kernels.linear.wide_linear import tensor_core as tensor_core

REFERENCE = "dsv4.reference.linear:joined_wide_linear"
MAX_PARTS = 5


@triton.jit
def _store(
    y_ptr, bias_ptr, position_ptr, total, row, token, T, N, R, b1, b2, b3, b4
):  # fmt: skip
    """Add the bias of each token's place, and write each row to where its part lies."""
    live = (token < T)[None, :] & (row < N)[:, None]
    place = tl.load(position_ptr + token, token < T, 0) % R
    total += tl.load(bias_ptr + place[None, :] * N + row[:, None], live, 0.0)
    start = tl.where(row >= b4, b4, tl.where(row >= b3, b3, tl.where(row >= b2, b2,
            tl.where(row >= b1, b1, 0))))  # fmt: skip
    end = tl.where(row < b1, b1, tl.where(row < b2, b2, tl.where(row < b3, b3,
          tl.where(row < b4, b4, N))))  # fmt: skip
    at = (start.to(tl.int64) * T + row - start)[:, None]
    at += token[None, :].to(tl.int64) * (end - start)[:, None]
    tl.store(y_ptr + at, total, live)


@triton.jit(do_not_specialize=["T"])
def joined_wide_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, position_ptr, y_ptr, partial_ptr, counter_ptr, T, N, K, R,
    b1, b2, b3, b4, num_chunks,
    IS_SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    tile, part = tl.program_id(0), tl.program_id(1)
    token = tl.program_id(2) * BM + tl.arange(0, BM)
    row = tile * BN + tl.arange(0, BN)
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
            y = sum_in_order(partial_ptr, offset, BM * BN, num_chunks)
            _store(y_ptr, bias_ptr, position_ptr, y, row, token, T, N, R, b1, b2, b3, b4)
    else:
        _store(y_ptr, bias_ptr, position_ptr, total, row, token, T, N, R, b1, b2, b3, b4)


def result(x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, parts: list[int]) -> Tensor:
    """Allocate y [T N] FP32: the op's fake."""
    return x.new_empty(x.shape[0] * weight.shape[0], dtype=torch.float32)


def outputs(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, parts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate y [T N] FP32, and what programs of one tile share: partial sums and counters."""
    y, partial, counters = wide_linear.outputs(x, weight)
    return y.flatten(), partial, counters


def check(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, parts: list[int], y: Tensor
) -> tuple[int, ...]:
    """Check the arguments; -> T, N, K, R and the first rows of all parts but the first."""
    sizes = check_tensors(
        x=(x, "T K", torch.bfloat16), weight=(weight, "N K", torch.bfloat16),
        bias=(bias, "R N", torch.float32), position=(position, "T", torch.int64),
    )  # fmt: skip
    T, N, K, R = (sizes[name] for name in "TNKR")
    check_tensors(y=(y, f"{T * N}", torch.float32))
    for i, rows in enumerate(parts):
        check_int(f"parts[{i}]", rows)
    if sum(parts) != N or len(parts) > MAX_PARTS:
        raise ValueError(f"parts: expected at most {MAX_PARTS} with the sum {N}, got {parts}")
    check_int("rows of bias", R)
    bounds = [*accumulate(parts)][:-1]
    return T, N, K, R, *bounds, *[N] * (MAX_PARTS - 1 - len(bounds))


def launch(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, parts: list[int],
    out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill y. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    y, partial, counters = out
    T, N, K, R, *bounds = check(x, weight, bias, position, parts, y)
    if T == 0:
        return
    num_chunks = wide_cut(N, K).num_chunks
    p = tile_plan(CONFIG, T, N, 1, num_chunks)
    joined_wide_linear_kernel[p.grid](
        x, weight, bias, position, y, partial, counters, T, N, K, R, *bounds, num_chunks,
        IS_SPLIT=p.is_split, **p.tile, **PDL,
    )  # fmt: skip


SPEC = KernelSpec("joined_wide_linear/triton", launch, runs_on_cpu=INTERPRETED)
