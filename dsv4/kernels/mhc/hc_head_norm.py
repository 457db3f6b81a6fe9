"""The streams collapsed for the LM head, and the final RMSNorm. Triton, two launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common import mhc
from dsv4.kernels.common.launch import INTERPRETED
from dsv4.kernels.common.mhc import N, project_slab
from dsv4.kernels.common.pdl import let_next_start

REFERENCE = "dsv4.reference.mhc:hc_head_norm"
CONFIG = {"PADDED": 16}  # columns of the tile of N products and the squares


@triton.jit(do_not_specialize=["T"])
def hc_head_norm_kernel(
    x_ptr, fn_ptr, partial_ptr, T, D: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    BF16: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    let_next_start()
    project_slab(
        x_ptr, x_ptr, x_ptr, x_ptr, fn_ptr, x_ptr, partial_ptr, T, D, M, MP, BF16, False, N,
        BLOCK_T, BLOCK_D,
    )  # fmt: skip


def outputs(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, norm_eps: float, eps: float
) -> tuple[Tensor, ...]:
    """Allocate y [T, D] and, last, working memory."""
    return x.new_empty(x.shape[0], x.shape[2]), mhc.new_partial(x, CONFIG["PADDED"])


def launch(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, norm_eps: float, eps: float,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    y, partial = out
    sizes = mhc.check_mhc(x, fn, scale, base, norm, y, N, 1)
    T, D = sizes["T"], sizes["D"]
    if T == 0:
        return
    mhc.project(
        hc_head_norm_kernel, T, D, N, CONFIG["PADDED"], x, fn, partial,
        bf16=x.dtype is torch.bfloat16,
    )  # fmt: skip
    nothing = (None,) * 4
    mhc.finish(x, partial, scale, base, norm, (y, *nothing), 1, norm_eps, eps, False)


SPEC = KernelSpec("hc_head_norm/triton", launch, runs_on_cpu=INTERPRETED)
