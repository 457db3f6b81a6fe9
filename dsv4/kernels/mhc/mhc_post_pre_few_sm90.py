"""mHC between two sub-layers for up to 8 tokens on Hopper: small blocks that exchange through L2.

The cluster kernel needs 16 SMs of one group empty at once, and asks for its weights only then: in a
decode step of V4-Flash 10.9 us from the end of `wo_b` to its own, against 6.7 alone (H200). A block
of this one has 32 columns and fits beside those of a linear, so its weights lie in shared memory
when the linear ends. Same arithmetic, same bits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.core.errors import KernelUnavailable
from dsv4.kernels.common import cuda, mhc_cluster
from dsv4.kernels.common.checks import check_aligned
from dsv4.kernels.mhc.mhc_post_pre import ROWS, check
from dsv4.kernels.mhc.mhc_post_pre_sm90 import REFERENCE, outputs

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "mhc_post_pre_kernel", "outputs", "why_not"]

MAX_TOKENS, MAX_WIDE_TOKENS = 8, 4  # wide: where blocks of eight warps would spill registers
COLUMNS = 32  # of a block
# Tokens up to -> warps of a block; each gathers the sums of one token. Beside wo_b (512 threads of
# 88 registers) 160 registers are left for a thread of four warps, 80 for one of eight.
CONFIG = {4: 4, MAX_TOKENS: 8}
MIN_BLOCKS = 3  # on an SM
MOST_SOURCES = mhc_cluster.MAX_D // COLUMNS
# struct Exchange, whose words of four numbers make its size a multiple of 16 bytes
EXCHANGE_INTS = -(-(MAX_TOKENS * (MOST_SOURCES * (5 * 2 * 4 + 2) + 1) + 1) // 4) * 4


@cache
def mhc_post_pre_kernel(T: int, D: int, norm_bf16: bool = True) -> cuda.Source:
    """The source for these sizes."""
    defines = {
        "D": D, "ROWS": ROWS, "POST": 1, "NORM_BF16": int(norm_bf16),
        "BLOCK_WARPS": next(CONFIG[most] for most in CONFIG if most >= T),
        "MIN_BLOCKS": MIN_BLOCKS, "MOST_SOURCES": MOST_SOURCES, "EXCHANGE_INTS": EXCHANGE_INTS,
    }  # fmt: skip
    path, shared = Path(__file__).with_suffix(".cu"), (mhc_cluster.DEVICE,)
    return cuda.Source.of(path, "mhc_post_pre_kernel", defines, shared)


def most_tokens(D: int) -> int:
    """How many a launch takes."""
    return MAX_TOKENS if D <= 4096 else MAX_WIDE_TOKENS


def why_not(x: Tensor, quantise: bool = False, eps: float | None = None) -> str | None:
    """Why these streams need another kernel, or None."""
    T, D = x.shape[0], x.shape[-1]
    most = most_tokens(D)
    if quantise:
        return "quantise: makes no FP8 copy"
    if most < T:
        return f"x: expected at most {most} tokens, got {T}"
    if reason := mhc_cluster.why_not(x, eps):
        return reason
    if x.is_cuda:  # blocks wait for each other
        fit = MIN_BLOCKS * torch.cuda.get_device_properties(x.device).multi_processor_count
        if fit < (needed := D // COLUMNS + T):
            return f"x: expected a device that holds {needed} blocks at once, this one: {fit}"
    return None


def launch(
    o: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    norm: Tensor, iters: int, norm_eps: float, eps: float, quantise: bool,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill `out`. Reads nothing back; a CUDA graph can hold it, once it has run outside."""
    T = check(o, x, post, comb, fn, scale, base, norm, iters, quantise, out)["T"]
    if T == 0:
        return
    if reason := why_not(x, quantise, eps):
        raise KernelUnavailable(f"{SPEC.name}: {reason}: call torch.ops.dsv4.mhc_post_pre")
    streams, y, new_post, new_comb, *_ = out
    check_aligned(16, o=o, x=x, post=post, comb=comb, fn=fn, streams=streams, y=y)
    D = x.shape[-1]
    source = mhc_post_pre_kernel(T, D, norm.dtype is torch.bfloat16)
    exchange = cuda.kept_memory(x.device, EXCHANGE_INTS)
    _kernel(source, x.device).launch(
        D // COLUMNS + T, 32 * dict(source.defines)["BLOCK_WARPS"], o, x, post, comb, fn, scale,
        base, norm, streams, y, new_post, new_comb, exchange, T, iters, float(norm_eps), float(eps),
        overlaps=True,
    )  # fmt: skip


@cache
def _kernel(source: cuda.Source, device: torch.device) -> cuda.Kernel:
    kernel = cuda.load(source, device, 0)
    # The share of L1 that large kernels choose: with another, blocks do not start beside theirs.
    attribute = cuda.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    cuda.driver_call("cuFuncSetAttribute", kernel.function, attribute, 100)
    return kernel


def sources() -> list[tuple[cuda.Source, str]]:
    """What is compiled ahead of time, with the instruction each must hold."""
    shapes = (4, 4096), (MAX_TOKENS, 4096), (MAX_WIDE_TOKENS, 7168)
    sizes = ((T, D, bf16) for T, D in shapes for bf16 in (True, False))
    return [(mhc_post_pre_kernel(*s), "HMMA.16816") for s in sizes]


SPEC = KernelSpec("mhc_post_pre/sm90_few", launch, arch=(9,), requires=cuda.why_not)
