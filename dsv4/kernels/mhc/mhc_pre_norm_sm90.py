"""mHC in front of a sub-layer on Hopper: one launch, one pass over the streams (mhc_cluster.cu).

As mhc_post_pre_sm90, without the streams to be made first.
"""

from __future__ import annotations

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common import cuda, mhc_cluster
from dsv4.kernels.common.mhc import new_results
from dsv4.kernels.common.mhc_cluster import why_not
from dsv4.kernels.mhc.mhc_pre_norm import REFERENCE, ROWS, check

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "mhc_pre_norm_kernel", "outputs", "why_not"]

CONFIG = {"CTAS": mhc_cluster.CTAS, "TILE": mhc_cluster.TILE}


def mhc_pre_norm_kernel(D: int, quantise: bool, norm_bf16: bool = True) -> cuda.Source:
    """The source for these sizes."""
    return mhc_cluster.source("mhc_pre_norm_kernel", D, ROWS, False, quantise, norm_bf16)


def outputs(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, iters: int, norm_eps: float,
    eps: float, quantise: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Allocate the five results."""
    return new_results(x, quantise)


def launch(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, iters: int, norm_eps: float,
    eps: float, quantise: bool, out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    if check(x, fn, scale, base, norm, iters, quantise, out)["T"] == 0:
        return
    names = ("y", "new_post", "new_comb", "value", "fp8_scale")
    tensors = dict(zip(names, out, strict=True))
    tensors |= {"x": x, "fn": fn, "scale": scale, "base": base, "norm": norm}
    mhc_cluster.start("mhc_pre_norm_kernel", ROWS, x, tensors, iters, norm_eps, eps, quantise)


def sources() -> list[tuple[cuda.Source, str]]:
    """What is compiled ahead of time, with the instruction each must hold."""
    sizes = ((D, quantise) for D in (4096, 7168) for quantise in (False, True))
    return [(mhc_pre_norm_kernel(*s), "HMMA.16816") for s in sizes]


SPEC = KernelSpec("mhc_pre_norm/sm90", launch, arch=(9,), requires=cuda.why_not)
