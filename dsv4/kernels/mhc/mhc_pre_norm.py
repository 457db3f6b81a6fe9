"""mHC in front of a sub-layer: mixes, maps, collapse and RMSNorm. Triton, three launches.

As mhc_post_pre, without the streams to be made first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common import mhc
from dsv4.kernels.common.launch import INTERPRETED
from dsv4.kernels.common.mhc import N, project_slab
from dsv4.kernels.common.pdl import let_next_start

REFERENCE = "dsv4.reference.mhc:mhc_pre_norm"
ROWS = N * (N + 2)
CONFIG = {"PADDED": 32}  # columns of the tile of ROWS products and the squares


@triton.jit(do_not_specialize=["T"])
def mhc_pre_norm_kernel(
    x_ptr, fn_ptr, partial_ptr, T, D: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    BF16: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    let_next_start()
    project_slab(
        x_ptr, x_ptr, x_ptr, x_ptr, fn_ptr, x_ptr, partial_ptr, T, D, M, MP, BF16, False, N,
        BLOCK_T, BLOCK_D,
    )  # fmt: skip


def outputs(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, iters: int, norm_eps: float,
    eps: float, quantise: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Allocate the five results and, last, working memory."""
    return *mhc.new_results(x, quantise), mhc.new_partial(x, CONFIG["PADDED"])


def check(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, iters: int, quantise: bool,
    out: tuple[Tensor, ...],
) -> dict[str, int]:  # fmt: skip
    """Check arguments and results; -> sizes T and D."""
    y, *results = out
    more = mhc.check_results(x, iters, quantise, tuple(results))
    return mhc.check_mhc(x, fn, scale, base, norm, y, ROWS, 3, **more)


def launch(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, iters: int, norm_eps: float,
    eps: float, quantise: bool, out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    sizes = check(x, fn, scale, base, norm, iters, quantise, out[:5])
    T, D = sizes["T"], sizes["D"]
    if T == 0:
        return
    *results, partial = out
    mhc.project(
        mhc_pre_norm_kernel, T, D, ROWS, CONFIG["PADDED"], x, fn, partial,
        bf16=x.dtype is torch.bfloat16,
    )  # fmt: skip
    mhc.finish(x, partial, scale, base, norm, tuple(results), iters, norm_eps, eps, quantise)


SPEC = KernelSpec("mhc_pre_norm/triton", launch, runs_on_cpu=INTERPRETED)
