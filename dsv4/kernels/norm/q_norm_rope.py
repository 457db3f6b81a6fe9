"""Norm of the query heads, then RoPE: one token and a few heads a program. Triton, SM 9 on.

The rotated dims are read once more, from L1, as a tile of their own: so pairs are split in 64 of
512 dims only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import widen
from dsv4.kernels.common.checks import check_float, check_pairs
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.rows import cast, rms_factor, rotate_pairs, rounded

REFERENCE = "dsv4.reference.fused:q_norm_rope"
CONFIG = {"BLOCK_H": 8, "num_warps": 4}


@triton.jit
def q_rows(
    q_ptr, cos_ptr, sin_ptr, position_ptr, out_ptr, t, first, eps,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BF16: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Heads `first` and on of token t."""
    NOPE: tl.constexpr = C - R
    h = (first + tl.arange(0, BLOCK_H))[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    r = tl.arange(0, BLOCK_R)[None, :]
    i = tl.arange(0, BLOCK_R // 2)
    q_ptr += t * (H * C)
    out_ptr += t * (H * C)
    position = tl.load(position_ptr + t)
    q = widen(tl.load(q_ptr + h * C + c, (h < H) & (c < C), 0.0))
    tail_at, is_tail = h * C + NOPE + r, (h < H) & (r < R)
    tail = widen(tl.load(q_ptr + tail_at, is_tail, 0.0))
    cos = tl.load(cos_ptr + position * (R // 2) + i, i < R // 2, 0.0)[None, :]
    sin = tl.load(sin_ptr + position * (R // 2) + i, i < R // 2, 0.0)[None, :]
    factor = rms_factor(q, eps, C)
    tl.store(out_ptr + h * C + c, cast(q * factor, BF16), (h < H) & (c < NOPE))
    tail = rotate_pairs(rounded(tail * factor, BF16), cos, sin, BLOCK_H, BLOCK_R, False)
    tl.store(out_ptr + tail_at, cast(tail, BF16), is_tail)


@triton.jit
def q_norm_rope_kernel(
    q_ptr, cos_ptr, sin_ptr, position_ptr, out_ptr, eps,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BF16: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    t = tl.program_id(0).to(tl.int64)
    q_rows(
        q_ptr, cos_ptr, sin_ptr, position_ptr, out_ptr, t, tl.program_id(1) * BLOCK_H, eps,
        H, C, R, BF16, BLOCK_C, BLOCK_R, BLOCK_H,
    )  # fmt: skip


def outputs(q: Tensor, cos: Tensor, sin: Tensor, position: Tensor, eps: float) -> Tensor:
    """Allocate the heads, like q. Doubles as the op's fake."""
    return torch.empty_like(q)


def launch(q: Tensor, cos: Tensor, sin: Tensor, position: Tensor, eps: float, out: Tensor) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    dtype = check_float("q", q)
    sizes = check_tensors(
        q=(q, "T H C", dtype),
        cos=(cos, "S pairs", torch.float32),
        sin=(sin, "S pairs", torch.float32),
        position=(position, "T", torch.int64),
        out=(out, "T H C", dtype),
    )
    T, H, C, R = sizes["T"], sizes["H"], sizes["C"], 2 * sizes["pairs"]
    check_pairs(R, C)
    if T == 0 or H == 0:
        return
    q_norm_rope_kernel[(T, triton.cdiv(H, CONFIG["BLOCK_H"]))](
        q, cos, sin, position, out, eps, H=H, C=C, R=R, BF16=dtype is torch.bfloat16,
        BLOCK_C=triton.next_power_of_2(C), BLOCK_R=triton.next_power_of_2(R),
        **CONFIG, **PDL, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("q_norm_rope/triton", launch, runs_on_cpu=INTERPRETED)
