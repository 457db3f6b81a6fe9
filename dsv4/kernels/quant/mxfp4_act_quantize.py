"""MXFP4: packed e2m1 with a UE8M0 scale a group. Triton, any SM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import widen
from dsv4.kernels.common.checks import check_float
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.rows import mxfp4_rows
from dsv4.kernels.quant.fp8_act_quantize import check_groups, config_for

REFERENCE = "dsv4.reference.quant:mxfp4_act_quantize"
CONFIG = {"TILE": 4096, "num_warps": 4}  # elements a program; swept on H200, T = 8192


@triton.jit
def mxfp4_act_quantize_kernel(
    x_ptr, packed_ptr, scale_ptr, num_groups, GROUP: tl.constexpr, BLOCK_G: tl.constexpr
):
    HALF: tl.constexpr = GROUP // 2
    first = tl.program_id(0).to(tl.int64) * BLOCK_G
    g = tl.arange(0, BLOCK_G)
    live = g < num_groups - first
    at = first * GROUP + g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = widen(tl.load(x_ptr + at, live[:, None], 0.0))
    packed, scale = mxfp4_rows(x, BLOCK_G, GROUP)
    half_at = first * HALF + g[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed_ptr + half_at, packed, live[:, None])
    tl.store(scale_ptr + first + g, scale, live)


def outputs(x: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """Allocate the packed values and the scales. Doubles as the op's fake."""
    groups = check_groups("x", x, group)
    *rows, K = x.shape
    scale = x.new_empty((*rows, groups), dtype=torch.float8_e8m0fnu)
    return x.new_empty((*rows, K // 2), dtype=torch.uint8), scale


def launch(x: Tensor, group: int, out: tuple[Tensor, Tensor]) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    packed, scale = out
    groups = check_groups("x", x, group)
    if group < 2:
        raise ValueError(f"group: expected at least 2, got {group}")
    *rows, K = x.shape
    lead = " ".join(map(str, rows))
    check_tensors(
        x=(x, f"{lead} {K}", check_float("x", x)),
        packed=(packed, f"{lead} {K // 2}", torch.uint8),
        scale=(scale, f"{lead} {groups}", torch.float8_e8m0fnu),
    )
    if x.numel() == 0:
        return
    tile, num_warps = config_for(CONFIG, x.numel())
    num_groups, block = x.numel() // group, max(tile // group, 1)
    mxfp4_act_quantize_kernel[(triton.cdiv(num_groups, block),)](
        x, packed, scale.view(torch.uint8), num_groups, GROUP=group, BLOCK_G=block,
        num_warps=num_warps, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("mxfp4_act_quantize/triton", launch, runs_on_cpu=INTERPRETED)
