"""mHC between two sub-layers for many tokens on Hopper: no exchange is waited for (mhc_many.cu).

The cluster kernel waits for two exchanges a tile with 112 of 132 SMs: 490 us for 8192 tokens at
D = 4096 (H200), 31 % of bandwidth. Here a token is finished some microseconds after its mixes, from
streams that L2 still holds: 320 us. Same arithmetic, same bits. The weights must not be written by
the launch just before: they are read while that one ends. Its blocks wait for each other: no kernel
whose blocks do so too may run on another stream.
"""

from __future__ import annotations

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.core.errors import KernelUnavailable
from dsv4.kernels.common import cuda, mhc_many
from dsv4.kernels.common.mhc_many import CONFIG, why_not
from dsv4.kernels.mhc import mhc_post_pre_sm90
from dsv4.kernels.mhc.mhc_post_pre import ROWS, check
from dsv4.kernels.mhc.mhc_post_pre_sm90 import REFERENCE

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "mhc_post_pre_kernel", "outputs", "why_not"]


def mhc_post_pre_kernel(D: int, quantise: bool, norm_bf16: bool = True) -> cuda.Source:
    """The source for these sizes."""
    return mhc_many.source("mhc_post_pre_kernel", D, ROWS, True, quantise, norm_bf16)


def outputs(
    o: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    norm: Tensor, iters: int, norm_eps: float, eps: float, quantise: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Allocate the six results and, last, working memory."""
    args = o, x, post, comb, fn, scale, base, norm, iters, norm_eps, eps, quantise
    return *mhc_post_pre_sm90.outputs(*args), mhc_many.new_partial(x, ROWS)


def launch(
    o: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    norm: Tensor, iters: int, norm_eps: float, eps: float, quantise: bool,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill `out`. Reads nothing back; a CUDA graph can hold it, once it has run outside."""
    T = check(o, x, post, comb, fn, scale, base, norm, iters, quantise, out[:6])["T"]
    if T == 0:
        return
    if reason := why_not(x):
        raise KernelUnavailable(f"{SPEC.name}: {reason}: call torch.ops.dsv4.mhc_post_pre")
    names = ("streams", "y", "new_post", "new_comb", "value", "fp8_scale", "partial")
    tensors = dict(zip(names, out, strict=True))
    tensors |= {"o": o, "x": x, "post": post, "comb": comb}
    tensors |= {"fn": fn, "scale": scale, "base": base, "norm": norm}
    mhc_many.start("mhc_post_pre_kernel", ROWS, x, tensors, iters, norm_eps, eps, quantise)


def sources() -> list[tuple[cuda.Source, str]]:
    """What is compiled ahead of time, with the instruction each must hold."""
    sizes = ((D, quantise) for D in (4096, 7168) for quantise in (False, True))
    return [(mhc_post_pre_kernel(*s), "HMMA.16816") for s in sizes]


SPEC = KernelSpec("mhc_post_pre/sm90_many", launch, arch=(9,), requires=cuda.why_not)
