"""Norm, RoPE, FP8 record and ring write of window KV, one token a program. Triton, SM 8.9 on.

Record bytes are stored one by one in the source; where the store is aligned, Triton joins them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.core.kv_layout import KvRecord
from dsv4.kernels.common.bits import bf16_bits, e8m0_value, widen
from dsv4.kernels.common.checks import check_float, check_int, check_pairs, check_stride
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.rows import (
    cast,
    e4m3_float,
    fp8_rows,
    rotate_pairs,
    rounded,
)

REFERENCE = "dsv4.reference.fused:kv_norm_rope_quant_insert"
CONFIG = {"num_warps": 1}
GROUP = tl.constexpr(64)  # nope dims that share a scale


@triton.jit
def kv_row(
    kv_ptr, norm_ptr, cos_ptr, sin_ptr, window_ptr, slot_ptr, position_ptr, end_ptr, out_ptr,
    t, stride, eps, ROWS: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BF16: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Token t, as a tile of one scaled group a row, and its rotated dims as a tile of their own."""
    NOPE: tl.constexpr = C - R
    DATA: tl.constexpr = NOPE + 2 * R
    slot = tl.load(slot_ptr + t)
    position = tl.load(position_ptr + t)
    end = tl.load(end_ptr + t)
    g = tl.arange(0, BLOCK_C // GROUP)
    c = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    r, i = NOPE + tl.arange(0, BLOCK_R)[None, :], tl.arange(0, BLOCK_R // 2)[None, :]
    kv = widen(tl.load(kv_ptr + t * C + c, c < C, 0.0))
    tail = widen(tl.load(kv_ptr + t * C + r, r < C, 0.0))
    weight = widen(tl.load(norm_ptr + c, c < C, 0.0))
    tail_weight = widen(tl.load(norm_ptr + r, r < C, 0.0))
    cos = tl.load(cos_ptr + position * (R // 2) + i, i < R // 2, 0.0)
    sin = tl.load(sin_ptr + position * (R // 2) + i, i < R // 2, 0.0)

    mean = tl.div_rn(tl.sum(tl.sum(kv * kv, axis=1), axis=0), C * 1.0)
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    code, scale = fp8_rows(rounded(kv * factor * weight, BF16))
    value = e4m3_float(code) * e8m0_value(scale.to(tl.int32))[:, None]
    tl.store(out_ptr + t * C + c, cast(value, BF16), c < NOPE)
    tail = rounded(tail * factor * tail_weight, BF16)
    bits = bf16_bits(rotate_pairs(tail, cos, sin, 1, BLOCK_R, False))
    tail = (bits << 16).to(tl.float32, bitcast=True)
    tl.store(out_ptr + t * C + r, cast(tail, BF16), r < C)

    # A chunk longer than the ring writes its last rows alone: one writer for each row.
    # Rows from the end on are drafts that were rejected.
    if (slot >= 0) & (position < end) & (position >= end - ROWS):
        row = position % ROWS
        data_ptr = window_ptr + slot * stride + row * DATA
        tl.store(data_ptr + c, code, c < NOPE)
        halves = tl.join((bits & 0xFF).to(tl.uint8), (bits >> 8).to(tl.uint8))
        b = tl.arange(0, 2 * BLOCK_R)[None, :]
        tl.store(data_ptr + NOPE + b, tl.reshape(halves, [1, 2 * BLOCK_R]), b < 2 * R)
        store_scales(window_ptr + slot * stride + ROWS * DATA, row, g, scale, NOPE // GROUP)


@triton.jit
def store_scales(scale_ptr, row, g, scale, SCALES: tl.constexpr):
    """SCALES bytes of record `row`, and zeros up to a multiple of 8."""
    scale_ptr += row * ((SCALES + 7) // 8 * 8)
    tl.store(scale_ptr + g, scale, g < SCALES)
    pad = (SCALES - 1) // 8 * 8 + tl.arange(0, 8)
    tl.store(scale_ptr + pad, tl.zeros([8], tl.uint8), pad >= SCALES)


@triton.jit
def kv_norm_rope_quant_insert_kernel(
    kv_ptr, norm_ptr, cos_ptr, sin_ptr, window_ptr, slot_ptr, position_ptr, end_ptr, out_ptr,
    stride, eps, ROWS: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BF16: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    kv_row(
        kv_ptr, norm_ptr, cos_ptr, sin_ptr, window_ptr, slot_ptr, position_ptr, end_ptr, out_ptr,
        tl.program_id(0).to(tl.int64), stride, eps, ROWS, C, R, BF16, BLOCK_C, BLOCK_R,
    )  # fmt: skip


def outputs(
    kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, window: Tensor, slot: Tensor,
    position: Tensor, end_position: Tensor, rows: int, eps: float,
) -> Tensor:  # fmt: skip
    """Allocate the rows [T, C], like kv. Doubles as the op's fake."""
    return torch.empty_like(kv)


def check_window_kv(
    kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, window: Tensor, slot: Tensor,
    position: Tensor, end_position: Tensor, rows: int, out: Tensor,
) -> tuple[int, int, int]:  # fmt: skip
    """Check the arguments -> T, C, R."""
    dtype = check_float("kv", kv)
    sizes = check_tensors(
        kv=(kv, "T C", dtype),
        norm=(norm, "C", check_float("norm", norm)),
        cos=(cos, "S pairs", torch.float32),
        sin=(sin, "S pairs", torch.float32),
        window=(window, "slots stride", torch.uint8),
        slot=(slot, "T", torch.int64),
        position=(position, "T", torch.int64),
        end_position=(end_position, "T", torch.int64),
        out=(out, "T C", dtype),
    )
    check_int("rows", rows)
    T, C, R = sizes["T"], sizes["C"], 2 * sizes["pairs"]
    check_pairs(R, C)
    check_stride("window", window, KvRecord(C, R).page_bytes(rows), f"{rows} rows")
    return T, C, R


def launch(
    kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, window: Tensor, slot: Tensor,
    position: Tensor, end_position: Tensor, rows: int, eps: float, out: Tensor,
) -> None:  # fmt: skip
    """Fill `out` and the ring. Allocates nothing, reads nothing back: a CUDA graph can hold it."""
    T, C, R = check_window_kv(kv, norm, cos, sin, window, slot, position, end_position, rows, out)
    if T == 0:
        return
    kv_norm_rope_quant_insert_kernel[(T,)](
        kv, norm, cos, sin, window, slot, position, end_position, out, window.shape[1], eps,
        ROWS=rows, C=C, R=R, BF16=kv.dtype is torch.bfloat16, BLOCK_C=triton.next_power_of_2(C),
        BLOCK_R=triton.next_power_of_2(R), **CONFIG, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("kv_norm_rope_quant_insert/triton", launch, runs_on_cpu=INTERPRETED)
