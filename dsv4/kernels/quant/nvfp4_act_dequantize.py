"""NVFP4 back to BF16 or FP32. Triton, any SM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import e4m3_value
from dsv4.kernels.common.checks import check_float
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.rows import cast, unpack_rows

REFERENCE = "dsv4.reference.fused:nvfp4_act_dequantize"
CONFIG = {"TILE": 4096, "num_warps": 4}  # elements a program
GROUP = 16


@triton.jit
def nvfp4_act_dequantize_kernel(
    packed_ptr, scale_ptr, share_ptr, out_ptr, num_groups, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = GROUP // 2
    first = tl.program_id(0).to(tl.int64) * BLOCK_G
    g = tl.arange(0, BLOCK_G)
    live = g < num_groups - first
    half_at = first * HALF + g[:, None] * HALF + tl.arange(0, HALF)[None, :]
    value = unpack_rows(tl.load(packed_ptr + half_at, live[:, None], 0), BLOCK_G, GROUP)
    scale = e4m3_value(tl.load(scale_ptr + first + g, live, 0).to(tl.int32))
    value = value * scale[:, None] * tl.load(share_ptr)
    at = first * GROUP + g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(out_ptr + at, cast(value, BF16), live[:, None])


def outputs(
    packed: Tensor, scale: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Allocate the values, twice as many as bytes. Doubles as the op's fake."""
    return packed.new_empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=dtype)


def launch(
    packed: Tensor, scale: Tensor, global_scale: Tensor, dtype: torch.dtype, out: Tensor
) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    *rows, half = packed.shape
    lead = " ".join(map(str, rows))
    check_tensors(
        packed=(packed, f"{lead} {half}", torch.uint8),
        scale=(scale, f"{lead} {2 * half // GROUP}", torch.float8_e4m3fn),
        global_scale=(global_scale, "", torch.float32),
        out=(out, f"{lead} {2 * half}", check_float("dtype", dtype)),
    )
    if half % (GROUP // 2):
        raise ValueError(f"packed: expected a last dim divisible by {GROUP // 2}, got {half}")
    if packed.numel() == 0:
        return
    num_groups, block = out.numel() // GROUP, CONFIG["TILE"] // GROUP
    nvfp4_act_dequantize_kernel[(triton.cdiv(num_groups, block),)](
        packed, scale.view(torch.uint8), global_scale, out, num_groups, GROUP=GROUP,
        BLOCK_G=block, BF16=dtype is torch.bfloat16, num_warps=CONFIG["num_warps"], **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("nvfp4_act_dequantize/triton", launch, runs_on_cpu=INTERPRETED)
