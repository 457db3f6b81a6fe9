"""What follows the q and kv projections, in one launch. Triton, SM 8.9 on.

The first programs take the window KV, the others the query heads; each does what the kernel of its
own does, bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.checks import check_float
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.norm.kv_norm_rope_quant_insert import check_window_kv, kv_row
from dsv4.kernels.norm.q_norm_rope import q_rows

REFERENCE = "dsv4.reference.fused:q_kv_norm_rope_insert"
CONFIG = {"BLOCK_H": 8, "num_warps": 4}


@triton.jit
def q_kv_norm_rope_insert_kernel(
    q_ptr, kv_ptr, norm_ptr, cos_ptr, sin_ptr, window_ptr, slot_ptr, position_ptr, end_ptr,
    q_out_ptr, kv_out_ptr, T, stride, eps,
    ROWS: tl.constexpr, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BF16: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    PER_TOKEN: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    n = tl.program_id(0)
    if n < T:
        kv_row(
            kv_ptr, norm_ptr, cos_ptr, sin_ptr, window_ptr, slot_ptr, position_ptr, end_ptr,
            kv_out_ptr, n.to(tl.int64), stride, eps, ROWS, C, R, BF16, BLOCK_C, BLOCK_R,
        )  # fmt: skip
    else:
        n -= T
        q_rows(
            q_ptr, cos_ptr, sin_ptr, position_ptr, q_out_ptr, (n // PER_TOKEN).to(tl.int64),
            n % PER_TOKEN * BLOCK_H, eps, H, C, R, BF16, BLOCK_C, BLOCK_R, BLOCK_H,
        )  # fmt: skip


def outputs(
    q: Tensor, kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, window: Tensor, slot: Tensor,
    position: Tensor, end_position: Tensor, rows: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Allocate the heads [T, H, C] and the rows [T, C]. Doubles as the op's fake."""
    return torch.empty_like(q), torch.empty_like(kv)


def launch(
    q: Tensor, kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, window: Tensor, slot: Tensor,
    position: Tensor, end_position: Tensor, rows: int, eps: float, out: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out` and the ring. Allocates nothing, reads nothing back: a CUDA graph can hold it."""
    q_out, kv_out = out
    T, C, R = check_window_kv(
        kv, norm, cos, sin, window, slot, position, end_position, rows, kv_out
    )
    dtype = check_float("kv", kv)
    sizes = check_tensors(
        kv=(kv, "T C", dtype), q=(q, "T H C", dtype), q_out=(q_out, "T H C", dtype)
    )
    if T == 0:
        return
    H = sizes["H"]
    programs = T * (1 + triton.cdiv(H, CONFIG["BLOCK_H"]))
    q_kv_norm_rope_insert_kernel[(programs,)](
        q, kv, norm, cos, sin, window, slot, position, end_position, q_out, kv_out, T,
        window.shape[1], eps, ROWS=rows, H=H, C=C, R=R, BF16=dtype is torch.bfloat16,
        BLOCK_C=triton.next_power_of_2(C), BLOCK_R=triton.next_power_of_2(R), **CONFIG, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("q_kv_norm_rope_insert/triton", launch, runs_on_cpu=INTERPRETED)
