"""mHC between two sub-layers on Hopper: one launch, one pass over the streams (mhc_cluster.cu).

16 blocks of a cluster hold a tile of 16 tokens, so the new streams are read again by nobody: at
D = 4096 80 KB a token move through memory, and 112 KB in the portable kernel. The weights must not
be written by the launch just before: their copy to shared memory begins while that one ends.
"""

from __future__ import annotations

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common import cuda, mhc_cluster
from dsv4.kernels.common.mhc import new_results
from dsv4.kernels.common.mhc_cluster import why_not
from dsv4.kernels.mhc.mhc_post_pre import REFERENCE, ROWS, check

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "mhc_post_pre_kernel", "outputs", "why_not"]

CONFIG = {"CTAS": mhc_cluster.CTAS, "TILE": mhc_cluster.TILE}


def mhc_post_pre_kernel(D: int, quantise: bool, norm_bf16: bool = True) -> cuda.Source:
    """The source for these sizes."""
    return mhc_cluster.source("mhc_post_pre_kernel", D, ROWS, True, quantise, norm_bf16)


def outputs(
    o: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    norm: Tensor, iters: int, norm_eps: float, eps: float, quantise: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Allocate the six results."""
    return x.new_empty(x.shape), *new_results(x, quantise)


def launch(
    o: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    norm: Tensor, iters: int, norm_eps: float, eps: float, quantise: bool,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    T = check(o, x, post, comb, fn, scale, base, norm, iters, quantise, out)["T"]
    if T == 0:
        return
    names = ("streams", "y", "new_post", "new_comb", "value", "fp8_scale")
    tensors = dict(zip(names, out, strict=True))
    tensors |= {"o": o, "x": x, "post": post, "comb": comb}
    tensors |= {"fn": fn, "scale": scale, "base": base, "norm": norm}
    mhc_cluster.start("mhc_post_pre_kernel", ROWS, x, tensors, iters, norm_eps, eps, quantise)


def sources() -> list[tuple[cuda.Source, str]]:
    """What is compiled ahead of time, with the instruction each must hold."""
    sizes = ((D, quantise) for D in (4096, 7168) for quantise in (False, True))
    return [(mhc_post_pre_kernel(*s), "HMMA.16816") for s in sizes]


SPEC = KernelSpec("mhc_post_pre/sm90", launch, arch=(9,), requires=cuda.why_not)
