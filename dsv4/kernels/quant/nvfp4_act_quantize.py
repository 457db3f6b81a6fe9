"""NVFP4: packed e2m1, an E4M3 scale a 16, one FP32 scale. Triton, any SM.

Without a given global scale a first launch leaves the largest magnitudes of its programs in the
last of the outputs, and every program of the second takes their maximum: no host, no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import ABS_MASK, widen
from dsv4.kernels.common.checks import check_float
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.rows import nvfp4_rows
from dsv4.kernels.quant.fp8_act_quantize import check_groups, config_for

REFERENCE = "dsv4.reference.fused:nvfp4_act_quantize"
CONFIG = {"TILE": 2048, "num_warps": 2}  # elements a program; swept on H200, T = 8192
AMAX_CONFIG = {"TILE": 8192, "num_warps": 8}
MAX_PARTS = 512  # programs of the first launch
GROUP = 16


@triton.jit
def nvfp4_amax_kernel(x_ptr, part_ptr, size, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    step = tl.num_programs(0).to(tl.int64) * TILE
    first = tl.program_id(0).to(tl.int64) * TILE
    top = tl.zeros([TILE], tl.int32)
    while first < size:
        x = widen(tl.load(x_ptr + first + i, i < size - first, 0.0))
        top = tl.maximum(top, x.to(tl.int32, bitcast=True) & ABS_MASK)
        first += step
    tl.store(part_ptr + tl.program_id(0), tl.max(top, axis=0))


@triton.jit
def nvfp4_act_quantize_kernel(
    x_ptr, global_ptr, part_ptr, num_parts, packed_ptr, scale_ptr, share_ptr, num_groups,
    GIVEN: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = GROUP // 2
    first = tl.program_id(0).to(tl.int64) * BLOCK_G
    g = tl.arange(0, BLOCK_G)
    live = g < num_groups - first
    at = first * GROUP + g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = widen(tl.load(x_ptr + at, live[:, None], 0.0))
    if GIVEN:
        share = tl.load(global_ptr)
    else:
        p = tl.arange(0, MAX_PARTS)
        top = tl.max(tl.load(part_ptr + p, p < num_parts, 0), axis=0)
        share = tl.div_rn(top.to(tl.float32, bitcast=True), 2688.0)  # 6 * 448
        share = tl.where(top == 0, 1.0, share)
    packed, scale = nvfp4_rows(x, share, BLOCK_G, GROUP)
    half_at = first * HALF + g[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed_ptr + half_at, packed, live[:, None])
    tl.store(scale_ptr + first + g, scale, live)
    if first == 0:
        tl.store(share_ptr, share)


def outputs(x: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate packed values, scales, the global scale, and the room of the first launch."""
    groups = check_groups("x", x, GROUP)
    *rows, K = x.shape
    return (
        x.new_empty((*rows, K // 2), dtype=torch.uint8),
        x.new_empty((*rows, groups), dtype=torch.float8_e4m3fn),
        x.new_empty((), dtype=torch.float32),
        x.new_empty(MAX_PARTS, dtype=torch.int32),
    )


def launch(
    x: Tensor, global_scale: Tensor | None, out: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    packed, scale, share, part = out
    groups = check_groups("x", x, GROUP)
    *rows, K = x.shape
    lead = " ".join(map(str, rows))
    given = {} if global_scale is None else {"global_scale": (global_scale, "", torch.float32)}
    check_tensors(
        x=(x, f"{lead} {K}", check_float("x", x)),
        packed=(packed, f"{lead} {K // 2}", torch.uint8),
        scale=(scale, f"{lead} {groups}", torch.float8_e4m3fn),
        share=(share, "", torch.float32),
        part=(part, str(MAX_PARTS), torch.int32),
        **given,
    )
    if x.numel() == 0:
        share.fill_(1.0) if global_scale is None else share.copy_(global_scale)
        return
    num_parts = min(triton.cdiv(x.numel(), AMAX_CONFIG["TILE"]), MAX_PARTS)
    if global_scale is None:
        nvfp4_amax_kernel[(num_parts,)](x, part, x.numel(), **AMAX_CONFIG)
    tile, num_warps = config_for(CONFIG, x.numel())
    num_groups, block = x.numel() // GROUP, tile // GROUP
    nvfp4_act_quantize_kernel[(triton.cdiv(num_groups, block),)](
        x, global_scale, part, num_parts, packed, scale.view(torch.uint8), share, num_groups,
        GIVEN=global_scale is not None, GROUP=GROUP, BLOCK_G=block, MAX_PARTS=MAX_PARTS,
        num_warps=num_warps, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("nvfp4_act_quantize/triton", launch, runs_on_cpu=INTERPRETED)
