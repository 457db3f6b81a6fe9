"""Host side of mhc_many.cu: its constants, its memory, and launches of groups of 16 blocks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.common import cuda, mhc_cluster
from dsv4.kernels.common.checks import check_aligned
from dsv4.kernels.common.mhc import N
from dsv4.kernels.common.mhc_cluster import CTAS, DEVICE, TILE

# MIN_TOKENS: fewer are for clusters, which need not add up what other SMs have sent; both take the
# same time from 113 to 257 tokens.
# LAG: so many tiles behind its mixes a token is finished: 1, 2, 4 take 320, 350, 365 us at 8192.
CONFIG = {"MIN_TOKENS": 256, "LAG": 1}
FLAGS = 32  # of the 16 teams that share tiles; 17 are used, a line in all
_POINTERS = (
    "o", "x", "post", "comb", "fn", "scale", "base", "norm", "streams", "y", "new_post", "new_comb",
    "value", "fp8_scale", "partial",
)  # fmt: skip


def why_not(x: Tensor) -> str | None:
    """Why these streams need another kernel, or None."""
    T, least = x.shape[0], CONFIG["MIN_TOKENS"]
    if least > T:
        return f"x: expected at least {least} tokens, got {T}"
    if reason := mhc_cluster.why_not(x):
        return reason
    if x.is_cuda:  # a group waits for each other
        sms = torch.cuda.get_device_properties(x.device).multi_processor_count
        if sms < CTAS:
            return f"x: expected a device of at least {CTAS} SMs, this one: {sms}"
    return None


def source(
    name: str, D: int, rows: int, post: bool, quantise: bool, norm_bf16: bool
) -> cuda.Source:
    """The device function `name` for these constants."""
    return _source(name, D, rows, post, quantise, norm_bf16, CONFIG["LAG"])


@cache
def _source(
    name: str, D: int, rows: int, post: bool, quantise: bool, norm_bf16: bool, lag: int
) -> cuda.Source:
    defines: dict[str, Any] = {
        "KERNEL": name, "D": D, "ROWS": rows, "POST": int(post), "QUANTISE": int(quantise),
        "NORM_BF16": int(norm_bf16), "LAG": lag,
    }  # fmt: skip
    _, defines["BLOCK_THREADS"], defines["SHARED_BYTES"] = plan(D, rows)
    return cuda.Source.of(Path(__file__).with_suffix(".cu"), name, defines, (DEVICE,))


def plan(D: int, rows: int) -> tuple[int, int, int]:
    """Teams of a block, its threads, and bytes of `struct Shared`."""
    slab = D // CTAS
    warps = slab // 32
    teams = 16 // warps if warps <= 8 else 1
    threads = 32 * warps * teams
    fn = warps * 2 * N * -(-rows // 8) * 768 if warps <= 8 else rows * (N * slab + 4) * 4
    floats = warps * TILE * 26 + 2 * TILE * (N + N * N) + D // 32
    return teams, threads, fn + 16 * N * threads + 4 * floats * teams


def new_partial(x: Tensor, rows: int) -> Tensor:
    """Working memory: the sums of every rank [T, 16, rows + 1]. Need not be cleared."""
    return x.new_empty((x.shape[0], CTAS, rows + 1), dtype=torch.float32)


def start(
    name: str, rows: int, x: Tensor, tensors: dict[str, Tensor], iters: int, norm_eps: float,
    eps: float, quantise: bool,
) -> None:  # fmt: skip
    """Launch for the tokens of x. tensors: the pointers of `Args`; those not named are null."""
    if reason := why_not(x):
        raise ValueError(reason)
    vectors = "o", "x", "post", "comb", "fn", "norm", "streams", "y", "new_comb"
    check_aligned(16, **{key: tensors[key] for key in vectors if key in tensors})
    T, _, D = x.shape
    is_bf16 = tensors["norm"].dtype is torch.bfloat16
    teams, threads, num_bytes = plan(D, rows)
    kernel = cuda.load(
        source(name, D, rows, "o" in tensors, quantise, is_bf16), x.device, num_bytes
    )
    groups = min(kernel.resident_blocks(threads) // CTAS, -(-T // TILE))
    flags = cuda.zeroed_counters(x.device, groups * teams * FLAGS)
    kernel.launch(
        CTAS * groups, threads, *(tensors.get(key) for key in _POINTERS), flags, T, iters,
        float(norm_eps), float(eps), overlaps=True,
    )  # fmt: skip
