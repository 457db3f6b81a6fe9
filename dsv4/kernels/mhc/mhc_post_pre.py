"""mHC between two sub-layers: post of one, pre and RMSNorm of the next. Triton, three launches.

The first makes the new streams and the partial products of a slab of columns; the second, one
program a token, adds them up, collapses and norms; the third makes the maps, one lane a token.
FP32 streams use the FP32 units for the products.
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

REFERENCE = "dsv4.reference.mhc:mhc_post_pre"
ROWS = N * (N + 2)
CONFIG = {"PADDED": 32}  # columns of the tile of ROWS products and the squares


@triton.jit(do_not_specialize=["T"])
def mhc_post_pre_kernel(
    o_ptr, x_ptr, post_ptr, comb_ptr, fn_ptr, streams_ptr, partial_ptr, T, D: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, BF16: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    let_next_start()
    project_slab(
        o_ptr, x_ptr, post_ptr, comb_ptr, fn_ptr, streams_ptr, partial_ptr, T, D, M, MP, BF16,
        True, N, BLOCK_T, BLOCK_D,
    )  # fmt: skip


def outputs(
    o: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    norm: Tensor, iters: int, norm_eps: float, eps: float, quantise: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Allocate the six results and, last, working memory."""
    results = mhc.new_results(x, quantise)
    return torch.empty_like(x), *results, mhc.new_partial(x, CONFIG["PADDED"])


def check(
    o: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    norm: Tensor, iters: int, quantise: bool, out: tuple[Tensor, ...],
) -> dict[str, int]:  # fmt: skip
    """Check arguments and results; -> sizes T and D."""
    streams, y, *results = out
    return mhc.check_mhc(
        x, fn, scale, base, norm, y, ROWS, 3,
        o=(o, "T D", x.dtype),
        post=(post, f"T {N}", torch.float32),
        comb=(comb, f"T {N} {N}", torch.float32),
        streams=(streams, f"T {N} D", x.dtype),
        **mhc.check_results(x, iters, quantise, tuple(results)),
    )  # fmt: skip


def launch(
    o: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    norm: Tensor, iters: int, norm_eps: float, eps: float, quantise: bool,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    sizes = check(o, x, post, comb, fn, scale, base, norm, iters, quantise, out[:6])
    T, D = sizes["T"], sizes["D"]
    if T == 0:
        return
    streams, *results, partial = out
    mhc.project(
        mhc_post_pre_kernel, T, D, ROWS, CONFIG["PADDED"], o, x, post, comb, fn, streams, partial,
        bf16=x.dtype is torch.bfloat16,
    )  # fmt: skip
    mhc.finish(
        streams, partial, scale, base, norm, tuple(results), iters, norm_eps, eps, quantise
    )  # fmt: skip


SPEC = KernelSpec("mhc_post_pre/triton", launch, runs_on_cpu=INTERPRETED)
