"""Norm of the query latent, and norm, RoPE and records of the KV rows, in one launch. Triton.

Two programs a token: one for the latent, one for the KV row and its record.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.core.kv_layout import KvRecord
from dsv4.kernels.attention import kv_step_pack
from dsv4.kernels.common.bits import widen
from dsv4.kernels.common.checks import check_float
from dsv4.kernels.common.kv_record import store_kv_record
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.rows import cast, rounded
from dsv4.kernels.common.vectors import rms_norm, rope

REFERENCE = "dsv4.reference.paged_attention:latent_kv_norm_pack"
CONFIG = {"num_warps": 4}


@triton.jit(do_not_specialize=["T"])
def latent_kv_norm_pack_kernel(
    x_ptr, q_norm_ptr, kv_norm_ptr, cos_ptr, sin_ptr, position_ptr, latent_ptr, kv_ptr, page_ptr,
    T, used, nbytes, eps, L: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BF16: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_PAD: tl.constexpr,
):  # fmt: skip
    let_next_start()
    t = tl.program_id(0).to(tl.int64)
    x_ptr += t * (L + C)
    if tl.program_id(1) == 0:
        i = tl.arange(0, BLOCK_L)
        # Names of its own: Triton wants one type for a name that both branches give a value.
        q_weight = widen(tl.load(q_norm_ptr + i, i < L, 0.0))
        wait_for_previous()
        latent = widen(tl.load(x_ptr + i, i < L, 0.0))
        tl.store(latent_ptr + t * L + i, cast(rms_norm(latent, q_weight, eps, L), BF16), i < L)
    else:
        c = tl.arange(0, BLOCK_C)
        weight = widen(tl.load(kv_norm_ptr + c, c < C, 0.0))
        wait_for_previous()
        x = widen(tl.load(x_ptr + L + c, c < C, 0.0))
        x = rounded(rms_norm(x, weight, eps, C), BF16)
        x = rounded(rope(x, cos_ptr, sin_ptr, tl.load(position_ptr + t), C, R, BLOCK_C), BF16)
        tl.store(kv_ptr + t * C + c, cast(x, BF16), c < C)
        store_kv_record(page_ptr, t, T, x, C, R, BLOCK_C)
        if t == 0:  # a page is padded with zeros to a multiple of a record's data part
            pad = used + tl.arange(0, BLOCK_PAD)
            tl.store(page_ptr + pad, tl.zeros([BLOCK_PAD], tl.uint8), pad < nbytes)


def outputs(
    x: Tensor, q_norm: Tensor, kv_norm: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate the latent, the KV rows and their page. Doubles as the op's fake."""
    latent = x.new_empty(x.shape[0], q_norm.shape[0])
    kv = x.new_empty(x.shape[0], kv_norm.shape[0])
    return latent, kv, kv_step_pack.outputs(kv, 2 * cos.shape[1])


def launch(
    x: Tensor, q_norm: Tensor, kv_norm: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
    eps: float, out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    latent, kv, page = out
    dtype = check_float("x", x)
    check_float("q_norm", q_norm)
    check_float("kv_norm", kv_norm)
    sizes = check_tensors(
        q_norm=(q_norm, "L", q_norm.dtype), kv_norm=(kv_norm, "C", kv_norm.dtype),
        cos=(cos, "S pairs", torch.float32), sin=(sin, "S pairs", torch.float32),
        position=(position, "T", torch.int64),
    )  # fmt: skip
    T, L, C, R = sizes["T"], sizes["L"], sizes["C"], 2 * sizes["pairs"]
    record = KvRecord(C, R)
    nbytes = record.page_bytes(T) if T else 0
    check_tensors(
        x=(x, f"{T} {L + C}", dtype), latent=(latent, f"{T} {L}", dtype),
        kv=(kv, f"{T} {C}", dtype), page=(page, f"{nbytes}", torch.uint8),
    )  # fmt: skip
    if T == 0:
        return
    latent_kv_norm_pack_kernel[(T, 2)](
        x, q_norm, kv_norm, cos, sin, position, latent, kv, page, T, T * record.nbytes, nbytes,
        eps, L=L, C=C, R=R, BF16=dtype is torch.bfloat16, BLOCK_L=triton.next_power_of_2(L),
        BLOCK_C=triton.next_power_of_2(C), BLOCK_PAD=triton.next_power_of_2(record.data_bytes),
        **CONFIG, **PDL, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("latent_kv_norm_pack/triton", launch, runs_on_cpu=INTERPRETED)
