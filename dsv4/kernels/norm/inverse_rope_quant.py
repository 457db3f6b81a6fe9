"""Inverse RoPE of the attention output and the FP8 cast of wo_a's input. Triton, SM 8.9 on.

A program takes one group of dims of many heads, so that only the last groups split pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import widen
from dsv4.kernels.common.checks import check_float, check_pairs, check_power_of_two
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.rows import fp8_rows, rotate_pairs, rounded

REFERENCE = "dsv4.reference.fused:inverse_rope_quant"
CONFIG = {"BLOCK_H": 32, "num_warps": 4}


@triton.jit
def inverse_rope_quant_kernel(
    o_ptr, cos_ptr, sin_ptr, position_ptr, value_ptr, scale_ptr,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BF16: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = C // GROUP
    t = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) % G
    h = tl.program_id(1) // G * BLOCK_H + tl.arange(0, BLOCK_H)
    h_H1, c = h[:, None], (g * GROUP + tl.arange(0, GROUP))[None, :]
    mask, at = (h_H1 < H) & (c < C), t * (H * C) + h_H1 * C + c
    x = widen(tl.load(o_ptr + at, mask, 0.0))
    if (g + 1) * GROUP > C - R:
        row = tl.load(position_ptr + t) * (R // 2)
        i = g * (GROUP // 2) + tl.arange(0, GROUP // 2) - (C - R) // 2
        cos = tl.load(cos_ptr + row + i, i >= 0, 1.0)[None, :]
        sin = tl.load(sin_ptr + row + i, i >= 0, 0.0)[None, :]
        rotated = rounded(rotate_pairs(x, cos, sin, BLOCK_H, GROUP, True), BF16)
        # Not by cos = 1, sin = 0 alone: a - b * 0 loses the sign of a zero.
        x = tl.where(c >= C - R, rotated, x)
    value, scale = fp8_rows(x)
    tl.store(value_ptr + at, value, mask)
    tl.store(scale_ptr + t * (H * G) + h * G + g, scale, h < H)


def outputs(
    o: Tensor, cos: Tensor, sin: Tensor, position: Tensor, group: int = 128
) -> tuple[Tensor, Tensor]:
    """Allocate the values and the scales. Doubles as the op's fake."""
    T, H, C = o.shape
    value = o.new_empty((T, H, C), dtype=torch.float8_e4m3fn)
    return value, o.new_empty((T, H, C // max(group, 1)), dtype=torch.float8_e8m0fnu)


def launch(
    o: Tensor, cos: Tensor, sin: Tensor, position: Tensor, group: int, out: tuple[Tensor, Tensor]
) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    value, scale = out
    check_power_of_two("group", group)
    sizes = check_tensors(
        o=(o, "T H C", check_float("o", o)),
        cos=(cos, "S pairs", torch.float32),
        sin=(sin, "S pairs", torch.float32),
        position=(position, "T", torch.int64),
        value=(value, "T H C", torch.float8_e4m3fn),
        scale=(scale, f"T H {o.shape[-1] // group}", torch.float8_e8m0fnu),
    )
    T, H, C, R = sizes["T"], sizes["H"], sizes["C"], 2 * sizes["pairs"]
    check_pairs(R, C)
    if group < 2 or C % group:
        raise ValueError(f"group: expected a divisor of {C} above 1, got {group}")
    if T == 0 or H == 0:
        return
    inverse_rope_quant_kernel[(T, C // group * triton.cdiv(H, CONFIG["BLOCK_H"]))](
        o, cos, sin, position, value.view(torch.uint8), scale.view(torch.uint8), H=H, C=C, R=R,
        BF16=o.dtype is torch.bfloat16, GROUP=group, **CONFIG, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("inverse_rope_quant/triton", launch, runs_on_cpu=INTERPRETED)
