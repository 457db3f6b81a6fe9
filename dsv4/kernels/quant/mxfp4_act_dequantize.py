"""MXFP4 back to BF16 or FP32. Triton, any SM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import e8m0_value
from dsv4.kernels.common.checks import check_float, check_power_of_two
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.rows import cast, unpack_rows

REFERENCE = "dsv4.reference.quant:mxfp4_act_dequantize"
CONFIG = {"TILE": 4096, "num_warps": 4}  # elements a program


@triton.jit
def mxfp4_act_dequantize_kernel(
    packed_ptr, scale_ptr, out_ptr, num_groups, GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = GROUP // 2
    first = tl.program_id(0).to(tl.int64) * BLOCK_G
    g = tl.arange(0, BLOCK_G)
    live = g < num_groups - first
    half_at = first * HALF + g[:, None] * HALF + tl.arange(0, HALF)[None, :]
    value = unpack_rows(tl.load(packed_ptr + half_at, live[:, None], 0), BLOCK_G, GROUP)
    scale = e8m0_value(tl.load(scale_ptr + first + g, live, 127).to(tl.int32))
    at = first * GROUP + g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(out_ptr + at, cast(value * scale[:, None], BF16), live[:, None])


def outputs(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate the values, twice as many as bytes. Doubles as the op's fake."""
    return packed.new_empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=dtype)


def launch(packed: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    *rows, half = packed.shape
    groups = scale.shape[-1] if scale.dim() else 0
    if half and (groups == 0 or half % groups):
        raise ValueError(
            f"scale: expected a divisor of {half} as last dim, got {list(scale.shape)}"
        )
    if packed.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"packed: expected torch.uint8 or torch.int8, got {packed.dtype}")
    lead = " ".join(map(str, rows))
    check_tensors(
        packed=(packed, f"{lead} {half}", packed.dtype),
        scale=(scale, f"{lead} {groups}", torch.float8_e8m0fnu),
        out=(out, f"{lead} {2 * half}", check_float("dtype", dtype)),
    )
    if packed.numel() == 0:
        return
    group = 2 * half // groups
    check_power_of_two("packed", group)
    num_groups, block = out.numel() // group, max(CONFIG["TILE"] // group, 1)
    mxfp4_act_dequantize_kernel[(triton.cdiv(num_groups, block),)](
        packed.view(torch.uint8), scale.view(torch.uint8), out, num_groups, GROUP=group,
        BLOCK_G=block, BF16=dtype is torch.bfloat16, num_warps=CONFIG["num_warps"], **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("mxfp4_act_dequantize/triton", launch, runs_on_cpu=INTERPRETED)
