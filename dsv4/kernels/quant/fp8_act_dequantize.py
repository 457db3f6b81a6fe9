"""FP8 with a UE8M0 scale a group, back to BF16 or FP32. Triton, SM 8.9 on."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import e8m0_value
from dsv4.kernels.common.checks import check_float, check_power_of_two
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.rows import cast, e4m3_float

REFERENCE = "dsv4.reference.quant:fp8_act_dequantize"
CONFIG = {"TILE": 2048, "num_warps": 4}  # elements a program


@triton.jit
def fp8_act_dequantize_kernel(
    data_ptr, scale_ptr, out_ptr, num_groups, GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_G
    g = tl.arange(0, BLOCK_G)
    live = g < num_groups - first
    at = first * GROUP + g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = e4m3_float(tl.load(data_ptr + at, live[:, None], 0))
    scale = e8m0_value(tl.load(scale_ptr + first + g, live, 127).to(tl.int32))
    tl.store(out_ptr + at, cast(value * scale[:, None], BF16), live[:, None])


def outputs(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate the values. Doubles as the op's fake."""
    return data.new_empty(data.shape, dtype=dtype)


def launch(data: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    *rows, K = data.shape
    groups = scale.shape[-1] if scale.dim() else 0
    if K and (groups == 0 or K % groups):
        raise ValueError(f"scale: expected a divisor of {K} as last dim, got {list(scale.shape)}")
    lead = " ".join(map(str, rows))
    check_tensors(
        data=(data, f"{lead} {K}", torch.float8_e4m3fn),
        scale=(scale, f"{lead} {groups}", torch.float8_e8m0fnu),
        out=(out, f"{lead} {K}", check_float("dtype", dtype)),
    )
    if data.numel() == 0:
        return
    group = K // groups
    check_power_of_two("data", group)
    num_groups, block = data.numel() // group, max(CONFIG["TILE"] // group, 1)
    fp8_act_dequantize_kernel[(triton.cdiv(num_groups, block),)](
        data.view(torch.uint8), scale.view(torch.uint8), out, num_groups, GROUP=group,
        BLOCK_G=block, BF16=dtype is torch.bfloat16, num_warps=CONFIG["num_warps"], **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("fp8_act_dequantize/triton", launch, runs_on_cpu=INTERPRETED)
