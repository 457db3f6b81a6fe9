"""mHC between two sub-layers for many tokens on Hopper: no exchange is waited for.

The cluster kernel waits for two exchanges a tile with 112 of 132 SMs: 490 us for 8192 tokens at
D = 4096 (H200), 31 % of bandwidth. Here a token is finished some microseconds after its mixes, from
streams that L2 still holds: 320 us. Same arithmetic, same bits. The weights must not be written by
the launch just before: they are read while that one ends. Its blocks wait for each other: no kernel
whose blocks do so too may run on another stream.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.core.errors import KernelUnavailable
from dsv4.kernels.common import cuda, mhc_cluster
from dsv4.kernels.common.checks import check_aligned
from dsv4.kernels.common.mhc import N
from dsv4.kernels.common.mhc_cluster import CTAS, DEVICE, TILE
from dsv4.kernels.mhc import mhc_post_pre_sm90
from dsv4.kernels.mhc.mhc_post_pre import ROWS, check
from dsv4.kernels.mhc.mhc_post_pre_sm90 import REFERENCE

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "mhc_post_pre_kernel", "outputs", "why_not"]

# MIN_TOKENS: fewer are for clusters, which need not add up what other SMs have sent; both take the
# same time from 113 to 257 tokens.
# LAG: so many tiles behind its mixes a token is finished: 1, 2, 4 take 320, 350, 365 us at 8192.
CONFIG = {"MIN_TOKENS": 256, "LAG": 1}
FLAGS = 32  # of the 16 teams that share tiles; 17 are used, a line in all
VECTORS = ("o", "x", "post", "comb", "fn", "norm", "streams", "y", "new_comb")  # read by 16 bytes


Args = mhc_cluster.args_type("partial", "flags")


def why_not(x: Tensor, eps: float | None = None) -> str | None:
    """Why these streams need another kernel, or None."""
    T, least = x.shape[0], CONFIG["MIN_TOKENS"]
    if least > T:
        return f"x: expected at least {least} tokens, got {T}"
    if reason := mhc_cluster.why_not(x, eps):
        return reason
    if x.is_cuda:  # a group waits for each other
        sms = torch.cuda.get_device_properties(x.device).multi_processor_count
        if sms < CTAS:
            return f"x: expected a device of at least {CTAS} SMs, this one: {sms}"
    return None


def plan(D: int) -> tuple[int, int, int]:
    """Teams of a block, its threads, and bytes of `struct Shared`."""
    slab = D // CTAS
    warps = slab // 32
    teams = 16 // warps if warps <= 8 else 1
    threads = 32 * warps * teams
    fn = warps * 2 * N * ROWS // 8 * 768 if warps <= 8 else ROWS * (N * slab + 4) * 4
    floats = warps * TILE * 26 + 2 * TILE * (N + N * N) + D // 32
    return teams, threads, fn + 16 * N * threads + 4 * floats * teams


@cache
def mhc_post_pre_kernel(
    D: int, quantise: bool, norm_bf16: bool = True, lag: int = CONFIG["LAG"]
) -> cuda.Source:
    """The source for these sizes."""
    _, threads, num_bytes = plan(D)
    defines = {
        "D": D, "ROWS": ROWS, "POST": 1, "QUANTISE": int(quantise), "NORM_BF16": int(norm_bf16),
        "LAG": lag, "FLAGS": FLAGS, "BLOCK_THREADS": threads, "SHARED_BYTES": num_bytes,
        "ARGS_BYTES": ctypes.sizeof(Args),
    }  # fmt: skip
    path = Path(__file__).with_suffix(".cu")
    return cuda.Source.of(path, "mhc_post_pre_kernel", defines, (DEVICE,))


def outputs(
    o: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    norm: Tensor, iters: int, norm_eps: float, eps: float, quantise: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Allocate the six results and, last, the sums of every rank, [T, 16, ROWS + 1]."""
    args = o, x, post, comb, fn, scale, base, norm, iters, norm_eps, eps, quantise
    partial = x.new_empty((x.shape[0], CTAS, ROWS + 1), dtype=torch.float32)
    return *mhc_post_pre_sm90.outputs(*args), partial


def launch(
    o: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    norm: Tensor, iters: int, norm_eps: float, eps: float, quantise: bool,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill `out`. Reads nothing back; a CUDA graph can hold it, once it has run outside."""
    T = check(o, x, post, comb, fn, scale, base, norm, iters, quantise, out[:6])["T"]
    if T == 0:
        return
    if reason := why_not(x, eps):
        raise KernelUnavailable(f"{SPEC.name}: {reason}: call torch.ops.dsv4.mhc_post_pre")
    names = ("streams", "y", "new_post", "new_comb", "value", "fp8_scale", "partial")
    tensors = dict(zip(names, out, strict=True))
    tensors |= {"o": o, "x": x, "post": post, "comb": comb}
    tensors |= {"fn": fn, "scale": scale, "base": base, "norm": norm}
    check_aligned(16, **{key: tensors[key] for key in VECTORS})
    D, is_bf16 = x.shape[2], norm.dtype is torch.bfloat16
    teams, threads, num_bytes = plan(D)
    source = mhc_post_pre_kernel(D, quantise, is_bf16, CONFIG["LAG"])
    kernel = cuda.load(source, x.device, num_bytes)
    groups = min(kernel.resident_blocks(threads) // CTAS, -(-T // TILE))
    tensors["flags"] = cuda.zeroed_counters(x.device, groups * teams * FLAGS)
    pointers = {key: v.data_ptr() for key, v in tensors.items()}
    args = Args(**pointers, T=T, iters=iters, norm_eps=norm_eps, eps=eps)
    kernel.launch(CTAS * groups, threads, args, overlaps=True)


def sources() -> list[tuple[cuda.Source, str]]:
    """What is compiled ahead of time, with the instruction each must hold."""
    sizes = ((D, quantise) for D in (4096, 7168) for quantise in (False, True))
    return [(mhc_post_pre_kernel(*s), "HMMA.16816") for s in sizes]


SPEC = KernelSpec("mhc_post_pre/sm90_many", launch, arch=(9,), requires=cuda.why_not)
