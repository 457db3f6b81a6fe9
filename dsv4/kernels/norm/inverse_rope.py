"""Inverse RoPE of the attention output in place: only the rotated dims move. Triton, SM 9 on."""

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
from dsv4.kernels.common.rows import cast, rotate_pairs

REFERENCE = "dsv4.reference.fused:inverse_rope"
CONFIG = {"BLOCK_H": 32, "num_warps": 4}


@triton.jit
def inverse_rope_kernel(
    o_ptr, cos_ptr, sin_ptr, position_ptr,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BF16: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    t = tl.program_id(0).to(tl.int64)
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    r, i = tl.arange(0, BLOCK_R)[None, :], tl.arange(0, BLOCK_R // 2)
    mask, at = (h < H) & (r < R), t * (H * C) + h * C + (C - R) + r
    position = tl.load(position_ptr + t)
    tail = widen(tl.load(o_ptr + at, mask, 0.0))
    cos = tl.load(cos_ptr + position * (R // 2) + i, i < R // 2, 0.0)[None, :]
    sin = tl.load(sin_ptr + position * (R // 2) + i, i < R // 2, 0.0)[None, :]
    tail = rotate_pairs(tail, cos, sin, BLOCK_H, BLOCK_R, True)
    tl.store(o_ptr + at, cast(tail, BF16), mask)


def launch(o: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> None:
    """Change `o`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    dtype = check_float("o", o)
    sizes = check_tensors(
        o=(o, "T H C", dtype),
        cos=(cos, "S pairs", torch.float32),
        sin=(sin, "S pairs", torch.float32),
        position=(position, "T", torch.int64),
    )
    T, H, C, R = sizes["T"], sizes["H"], sizes["C"], 2 * sizes["pairs"]
    check_pairs(R, C)
    if T == 0 or H == 0:
        return
    inverse_rope_kernel[(T, triton.cdiv(H, CONFIG["BLOCK_H"]))](
        o, cos, sin, position, H=H, C=C, R=R, BF16=dtype is torch.bfloat16,
        BLOCK_R=triton.next_power_of_2(R), **CONFIG, **PDL, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("inverse_rope/triton", launch, runs_on_cpu=INTERPRETED)
