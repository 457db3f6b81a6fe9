"""Dense indexer keys out of the pages, dequantised, one program a key. Triton, any SM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.core.kv_layout import IndexRecord
from dsv4.kernels.common.bits import narrow
from dsv4.kernels.common.checks import check_float, check_int, check_power_of_two, check_stride
from dsv4.kernels.common.compressor import entry_row
from dsv4.kernels.common.kv_record import load_index_key
from dsv4.kernels.common.launch import EXACT, INTERPRETED

REFERENCE = "dsv4.reference.cache_writes:gather_index_keys"
CONFIG = {"num_warps": 1}


@triton.jit
def gather_index_keys_kernel(
    pages_ptr, table_ptr, slot_ptr, entry_ptr, out_ptr, max_pages, stride, num_rows,
    J: tl.constexpr, BF16: tl.constexpr, MXFP4: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    page, row = entry_row(
        table_ptr, tl.load(slot_ptr + n), tl.load(entry_ptr + n), max_pages, num_rows
    )
    x = load_index_key(pages_ptr + page * stride, row, num_rows, page > 0, J, MXFP4)
    tl.store(out_ptr + n * J + tl.arange(0, J), narrow(x, BF16))


def outputs(
    pages: Tensor, page_table: Tensor, slot: Tensor, entry: Tensor, entries_per_page: int,
    head_dim: int, keys: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Allocate the keys [N, J]. Doubles as the op's fake."""
    return pages.new_empty((slot.shape[0], head_dim), dtype=dtype)


def launch(
    pages: Tensor, page_table: Tensor, slot: Tensor, entry: Tensor, entries_per_page: int,
    head_dim: int, keys: str, dtype: torch.dtype, out: Tensor,
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
    check_power_of_two("head_dim", head_dim)
    stride = IndexRecord(head_dim, keys).page_bytes(entries_per_page)
    check_stride("pages", pages, stride, f"{entries_per_page} keys in {keys}")
    if N == 0:
        return
    gather_index_keys_kernel[(N,)](
        pages, page_table, slot, entry, out, page_table.shape[1], stride, entries_per_page,
        J=head_dim, BF16=dtype is torch.bfloat16, MXFP4=keys == "mxfp4", **CONFIG, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("gather_index_keys/triton", launch, runs_on_cpu=INTERPRETED)
