"""Embedding rows into every residual stream, one token and block of columns a program. Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.checks import check_float, check_int
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous

REFERENCE = "dsv4.reference.mhc:embed_streams"
CONFIG = {"BLOCK_D": 1024, "num_warps": 4}


@triton.jit
def embed_streams_kernel(
    ids_ptr, table_ptr, out_ptr, V, D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(ids_ptr + t)
    is_known = (token >= 0) & (token < V)
    # The interpreter takes no mask made of a scalar condition, but a bound made of one.
    row = tl.load(table_ptr + token * D + d, d < tl.where(is_known, D, 0), 0.0)
    for k in tl.static_range(N):
        tl.store(out_ptr + (t * N + k) * D + d, row, d < D)


def outputs(ids: Tensor, table: Tensor, num_streams: int) -> Tensor:
    """Allocate the streams [T, num_streams, D]. Doubles as the op's fake."""
    return table.new_empty(ids.shape[0], num_streams, table.shape[1])


def launch(ids: Tensor, table: Tensor, num_streams: int, out: Tensor) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    check_int("num_streams", num_streams)
    sizes = check_tensors(
        ids=(ids, "T", torch.int64),
        table=(table, "V D", check_float("table", table)),
        out=(out, f"T {num_streams} D", table.dtype),
    )
    T, D = sizes["T"], sizes["D"]
    if T == 0:
        return
    embed_streams_kernel[(T, triton.cdiv(D, CONFIG["BLOCK_D"]))](
        ids, table, out, sizes["V"], D=D, N=num_streams, **CONFIG, **PDL, **EXACT
    )


SPEC = KernelSpec("embed_streams/triton", launch, runs_on_cpu=INTERPRETED)
