"""RMSNorm with a weight, a few rows a program. Triton, SM 9 on."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import widen
from dsv4.kernels.common.checks import check_float
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.rows import cast, rms_factor

REFERENCE = "dsv4.reference.norm:rms_norm"
CONFIG = {"TILE": 2048, "num_warps": 2}  # TILE elements, or one row if it is longer


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, T, eps,
    D: tl.constexpr, BF16: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    let_next_start()
    BLOCK_T: tl.constexpr = TILE // BLOCK_D if TILE > BLOCK_D else 1
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = tl.arange(0, BLOCK_T)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (t < T - first) & (d < D)
    at = first * D + t * D + d
    weight = widen(tl.load(weight_ptr + d, d < D, 0.0))
    wait_for_previous()
    x = widen(tl.load(x_ptr + at, mask, 0.0))
    tl.store(out_ptr + at, cast(x * rms_factor(x, eps, D) * weight, BF16), mask)


def outputs(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Allocate the result, like x. Doubles as the op's fake."""
    return torch.empty_like(x)


def launch(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    if x.dim() == 0:
        raise ValueError("x: expected [..., D], got a scalar")
    D = x.shape[-1]
    shape = " ".join(map(str, x.shape))
    dtype = check_float("x", x)
    check_tensors(
        x=(x, shape, dtype),
        weight=(weight, str(D), check_float("weight", weight)),
        out=(out, shape, dtype),
    )
    if x.numel() == 0:
        return
    T, block = x.numel() // D, triton.next_power_of_2(D)
    rms_norm_kernel[(triton.cdiv(T, max(CONFIG["TILE"] // block, 1)),)](
        x, weight, out, T, eps, D=D, BF16=dtype is torch.bfloat16, BLOCK_D=block,
        TILE=CONFIG["TILE"], num_warps=warps(block), **PDL, **EXACT,
    )  # fmt: skip


def warps(block: int) -> int:
    """Warps of a program: more for a row longer than TILE."""
    return CONFIG["num_warps"] * min(max(block // CONFIG["TILE"], 1), 2)


SPEC = KernelSpec("rms_norm/triton", launch, runs_on_cpu=INTERPRETED)
