"""Dense window rows out of the ring, dequantised, one program a row. Triton, any SM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.core.kv_layout import KvRecord
from dsv4.kernels.common.bits import narrow
from dsv4.kernels.common.checks import check_float, check_int, check_stride
from dsv4.kernels.common.kv_record import load_kv_record
from dsv4.kernels.common.launch import EXACT, INTERPRETED

REFERENCE = "dsv4.reference.cache_writes:gather_window"
CONFIG = {"num_warps": 4}


@triton.jit
def gather_window_kernel(
    window_ptr, slot_ptr, position_ptr, out_ptr, stride, rows,
    C: tl.constexpr, R: tl.constexpr, BF16: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + n)
    position = tl.load(position_ptr + n)
    c = tl.arange(0, BLOCK_C)
    live = (slot >= 0) & (position >= 0)
    x = load_kv_record(window_ptr + slot * stride, position % rows, rows, live, C, R, BLOCK_C)
    tl.store(out_ptr + n * C + c, narrow(x, BF16), c < C)


def outputs(
    window: Tensor, slot: Tensor, position: Tensor, rows: int, head_dim: int, rope_dim: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Allocate the rows [N, C]. Doubles as the op's fake."""
    return window.new_empty((slot.shape[0], head_dim), dtype=dtype)


def launch(
    window: Tensor, slot: Tensor, position: Tensor, rows: int, head_dim: int, rope_dim: int,
    dtype: torch.dtype, out: Tensor,
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    N = check_tensors(
        window=(window, "slots stride", torch.uint8),
        slot=(slot, "N", torch.int64),
        position=(position, "N", torch.int64),
        out=(out, f"N {head_dim}", check_float("dtype", dtype)),
    )["N"]
    check_int("rows", rows)
    stride = KvRecord(head_dim, rope_dim).page_bytes(rows)
    check_stride("window", window, stride, f"{rows} rows")
    if N == 0:
        return
    gather_window_kernel[(N,)](
        window, slot, position, out, stride, rows,
        C=head_dim, R=rope_dim, BF16=dtype is torch.bfloat16,
        BLOCK_C=triton.next_power_of_2(head_dim), **CONFIG, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("gather_window/triton", launch, runs_on_cpu=INTERPRETED)
