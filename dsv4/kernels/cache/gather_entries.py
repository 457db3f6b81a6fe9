"""Dense compressed entries out of the pages, dequantised, one program an entry. Triton, any SM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.core.kv_layout import KvRecord
from dsv4.kernels.common.bits import narrow
from dsv4.kernels.common.checks import check_float, check_int, check_stride
from dsv4.kernels.common.compressor import entry_row
from dsv4.kernels.common.kv_record import load_kv_record
from dsv4.kernels.common.launch import EXACT, INTERPRETED

REFERENCE = "dsv4.reference.cache_writes:gather_entries"
CONFIG = {"num_warps": 4}


@triton.jit
def gather_entries_kernel(
    pages_ptr, table_ptr, slot_ptr, entry_ptr, out_ptr, max_pages, stride, num_rows,
    C: tl.constexpr, R: tl.constexpr, BF16: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    page, row = entry_row(
        table_ptr, tl.load(slot_ptr + n), tl.load(entry_ptr + n), max_pages, num_rows
    )
    c = tl.arange(0, BLOCK_C)
    x = load_kv_record(pages_ptr + page * stride, row, num_rows, page > 0, C, R, BLOCK_C)
    tl.store(out_ptr + n * C + c, narrow(x, BF16), c < C)


def outputs(
    pages: Tensor, page_table: Tensor, slot: Tensor, entry: Tensor, entries_per_page: int,
    head_dim: int, rope_dim: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Allocate the entries [N, C]. Doubles as the op's fake."""
    return pages.new_empty((slot.shape[0], head_dim), dtype=dtype)


def launch(
    pages: Tensor, page_table: Tensor, slot: Tensor, entry: Tensor, entries_per_page: int,
    head_dim: int, rope_dim: int, dtype: torch.dtype, out: Tensor,
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    N = check_tensors(
        pages=(pages, "pages stride", torch.uint8),
        page_table=(page_table, "slots max_pages", torch.int32),
        slot=(slot, "N", torch.int64),
        entry=(entry, "N", torch.int64),
        out=(out, f"N {head_dim}", check_float("dtype", dtype)),
    )["N"]
    check_int("entries_per_page", entries_per_page)
    stride = KvRecord(head_dim, rope_dim).page_bytes(entries_per_page)
    check_stride("pages", pages, stride, f"{entries_per_page} entries")
    if N == 0:
        return
    gather_entries_kernel[(N,)](
        pages, page_table, slot, entry, out, page_table.shape[1], stride, entries_per_page,
        C=head_dim, R=rope_dim, BF16=dtype is torch.bfloat16,
        BLOCK_C=triton.next_power_of_2(head_dim), **CONFIG, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("gather_entries/triton", launch, runs_on_cpu=INTERPRETED)
