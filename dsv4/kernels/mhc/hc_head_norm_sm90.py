"""The collapse for the LM head on Hopper: one launch and pass over the streams (mhc_cluster.cu)."""

from __future__ import annotations

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common import cuda, mhc_cluster
from dsv4.kernels.common.mhc import N, check_mhc
from dsv4.kernels.common.mhc_cluster import why_not
from dsv4.kernels.mhc.hc_head_norm import REFERENCE

__all__ = ["CONFIG", "REFERENCE", "SPEC", "hc_head_norm_kernel", "launch", "outputs", "why_not"]

CONFIG = {"CTAS": mhc_cluster.CTAS, "TILE": mhc_cluster.TILE}


def hc_head_norm_kernel(D: int, norm_bf16: bool = True) -> cuda.Source:
    """The source for this width."""
    return mhc_cluster.source("hc_head_norm_kernel", D, N, False, False, norm_bf16)


def outputs(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, norm_eps: float, eps: float
) -> tuple[Tensor, ...]:
    """Allocate y [T, D]."""
    return (x.new_empty(x.shape[0], x.shape[2]),)


def launch(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, norm_eps: float, eps: float,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    (y,) = out
    if check_mhc(x, fn, scale, base, norm, y, N, 1)["T"] == 0:
        return
    tensors = {"x": x, "fn": fn, "scale": scale, "base": base, "norm": norm, "y": y}
    mhc_cluster.start("hc_head_norm_kernel", N, x, tensors, 1, norm_eps, eps, False)


def sources() -> list[tuple[cuda.Source, str]]:
    """What is compiled ahead of time, with the instruction each must hold."""
    return [(hc_head_norm_kernel(D), "HMMA.16816") for D in (4096, 7168)]


SPEC = KernelSpec("hc_head_norm/sm90", launch, arch=(9,), requires=cuda.why_not)
