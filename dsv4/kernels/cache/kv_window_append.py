"""Window KV of new tokens: cast and write into the ring, one program a token. Triton, SM 9 on."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.core.kv_layout import KvRecord
from dsv4.kernels.common.bits import widen
from dsv4.kernels.common.checks import check_float, check_int, check_stride
from dsv4.kernels.common.kv_record import store_kv_record
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous

REFERENCE = "dsv4.reference.cache_writes:kv_window_append"
CONFIG = {"num_warps": 2}


@triton.jit
def append_window_row(
    kv_ptr, window_ptr, slot_ptr, position_ptr, end_ptr, t, stride, rows,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The record of token t, if the ring takes it."""
    slot = tl.load(slot_ptr + t)
    position = tl.load(position_ptr + t)
    end = tl.load(end_ptr + t)
    # A chunk longer than the ring writes its last `rows` tokens: one writer for each row.
    if (slot >= 0) & (position < end) & (position >= end - rows):
        c = tl.arange(0, BLOCK_C)
        kv = widen(tl.load(kv_ptr + t * C + c, c < C, 0.0))
        store_kv_record(window_ptr + slot * stride, position % rows, rows, kv, C, R, BLOCK_C)


@triton.jit
def kv_window_append_kernel(
    kv_ptr, window_ptr, slot_ptr, position_ptr, end_ptr, stride, rows,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    append_window_row(
        kv_ptr, window_ptr, slot_ptr, position_ptr, end_ptr, tl.program_id(0).to(tl.int64),
        stride, rows, C, R, BLOCK_C,
    )  # fmt: skip


def check(
    kv: Tensor, window: Tensor, slot: Tensor, position: Tensor, end_position: Tensor,
    rows: int, rope_dim: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Check the arguments; -> T, C, bytes of a ring."""
    sizes = check_tensors(
        kv=(kv, "T C", check_float("kv", kv)),
        window=(window, "slots stride", torch.uint8),
        slot=(slot, "T", torch.int64),
        position=(position, "T", torch.int64),
        end_position=(end_position, "T", torch.int64),
    )
    check_int("rows", rows)
    stride = KvRecord(sizes["C"], rope_dim).page_bytes(rows)
    check_stride("window", window, stride, f"{rows} rows")
    return sizes["T"], sizes["C"], stride


def launch(
    kv: Tensor, window: Tensor, slot: Tensor, position: Tensor, end_position: Tensor,
    rows: int, rope_dim: int,
) -> None:  # fmt: skip
    """Write the rows. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    T, C, stride = check(kv, window, slot, position, end_position, rows, rope_dim)
    if T == 0:
        return
    kv_window_append_kernel[(T,)](
        kv, window, slot, position, end_position, stride, rows,
        C=C, R=rope_dim, BLOCK_C=triton.next_power_of_2(C), **CONFIG, **PDL, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("kv_window_append/triton", launch, runs_on_cpu=INTERPRETED)
