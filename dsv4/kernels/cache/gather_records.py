"""Raw records out of pages or rings, value part and scale part joined. Triton, any SM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.checks import check_int
from dsv4.kernels.common.launch import EXACT, INTERPRETED

REFERENCE = "dsv4.reference.cache_writes:gather_records"
CONFIG = {"num_warps": 4}


@triton.jit
def gather_records_kernel(
    store_ptr, page_ptr, row_ptr, out_ptr, stride, num_rows,
    VALUE: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    page = tl.load(page_ptr + n)
    row = tl.load(row_ptr + n)
    b = tl.arange(0, BLOCK)
    value_at, scale_at = row * VALUE + b, num_rows * VALUE + row * SCALE + (b - VALUE)
    at = tl.where(b < VALUE, value_at, scale_at)
    end = tl.where((page >= 0) & (row >= 0), VALUE + SCALE, 0)
    byte = tl.load(store_ptr + page * stride + at, b < end, 0)
    tl.store(out_ptr + n * (VALUE + SCALE) + b, byte, b < VALUE + SCALE)


def outputs(
    store: Tensor, page: Tensor, row: Tensor, num_rows: int, value_bytes: int, scale_bytes: int
) -> Tensor:
    """Allocate the records [N, value_bytes + scale_bytes]. Doubles as the op's fake."""
    return store.new_empty((page.shape[0], value_bytes + scale_bytes))


def launch(
    store: Tensor, page: Tensor, row: Tensor, num_rows: int, value_bytes: int, scale_bytes: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    sizes = check_tensors(
        store=(store, "pages stride", torch.uint8),
        page=(page, "N", torch.int64),
        row=(row, "N", torch.int64),
        out=(out, f"N {value_bytes + scale_bytes}", torch.uint8),
    )
    for name, value in (("num_rows", num_rows), ("value_bytes", value_bytes)):
        check_int(name, value)
    check_int("scale_bytes", scale_bytes, low=0)
    N, stride = sizes["N"], sizes["stride"]
    if stride < num_rows * (value_bytes + scale_bytes):
        raise ValueError(
            f"store: expected at least {num_rows * (value_bytes + scale_bytes)} bytes a page, "
            f"got {stride}"
        )
    if N == 0:
        return
    gather_records_kernel[(N,)](
        store, page, row, out, stride, num_rows, VALUE=value_bytes, SCALE=scale_bytes,
        BLOCK=triton.next_power_of_2(value_bytes + scale_bytes), **CONFIG, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("gather_records/triton", launch, runs_on_cpu=INTERPRETED)
