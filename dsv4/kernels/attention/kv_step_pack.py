"""The KV rows of a step as one page of FP8 records, one program a row. Triton, SM 9 on.

Attention reads the step's own tokens from it, so it has one way to read a key.
"""

import triton
import triton.language as tl
from torch import Tensor, uint8

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.core.kv_layout import KvRecord
from dsv4.kernels.common.bits import widen
from dsv4.kernels.common.checks import check_float
from dsv4.kernels.common.kv_record import store_kv_record
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous

REFERENCE = "dsv4.reference.paged_attention:kv_step_pack"
CONFIG = {"num_warps": 4}


@triton.jit
def kv_step_pack_kernel(
    kv_ptr, page_ptr, T, used, nbytes, C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    x = widen(tl.load(kv_ptr + t * C + c, c < C, 0.0))
    store_kv_record(page_ptr, t, T, x, C, R, BLOCK_C)
    if t == 0:  # a page is padded with zeros to a multiple of a record's data part
        pad = used + tl.arange(0, BLOCK_PAD)
        tl.store(page_ptr + pad, tl.zeros([BLOCK_PAD], tl.uint8), pad < nbytes)


def outputs(kv: Tensor, rope_dim: int) -> Tensor:
    """Allocate the page, uint8 [page_bytes(T)]. Doubles as the op's fake."""
    record = KvRecord(kv.shape[1], rope_dim)
    # As record.page_bytes, which takes neither 0 nor a symbolic T.
    data_parts = triton.cdiv(kv.shape[0] * record.nbytes, record.data_bytes)
    return kv.new_empty(data_parts * record.data_bytes, dtype=uint8)


def launch(kv: Tensor, rope_dim: int, out: Tensor) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    T, C = kv.shape
    record = KvRecord(C, rope_dim)
    nbytes = record.page_bytes(T) if T else 0
    check_tensors(kv=(kv, "T C", check_float("kv", kv)), out=(out, f"{nbytes}", uint8))
    if T == 0:
        return
    kv_step_pack_kernel[(T,)](
        kv, out, T, T * record.nbytes, nbytes, C=C, R=rope_dim,
        BLOCK_C=triton.next_power_of_2(C), BLOCK_PAD=triton.next_power_of_2(record.data_bytes),
        **CONFIG, **PDL, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("kv_step_pack/triton", launch, runs_on_cpu=INTERPRETED)
