"""Routed experts of up to 64 tokens on Hopper, one launch of CUDA C++ (moe_routed_sm90.cu).

Plain Triton stayed near 1.4 TB/s (H200, M = 1, weights row by row, before they lay in tiles). The
figures of this kernel are in docs/performance/moe.md.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.core.errors import KernelUnavailable
from dsv4.kernels.common import cuda
from dsv4.kernels.common.checks import check_aligned
from dsv4.kernels.common.linear_device import DEVICE
from dsv4.kernels.moe.moe_routed import GROUPS, REFERENCE, check, outputs

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "moe_routed_kernel", "outputs"]

MAX_TOKENS = 64
STAGED_BYTES = 96 << 10  # most shared memory for tokens
# Swept on H200: more inputs a step (U 4) or stages (4, 6) were slower, fewer inputs (U 1) too.
CONFIG = {"U": 2, "STAGES": 3}
# tokens up to -> columns of the tensor-core tile in use, warps of a block, blocks on an SM. Few
# tokens of a step share an expert; where more do, its weights are read again from L2.
PLANS = {1: (1, 4, 4), 8: (4, 4, 3), MAX_TOKENS: (8, 16, 1)}
TEXT = Path(__file__).with_suffix(".cu")


def plan(T: int, K: int, D: int, F: int, E: int, format: str) -> dict[str, int]:
    """The constants of the source."""
    most = next(most for most in PLANS if most >= T)
    tokens, warps, blocks = PLANS[most]
    while F % (8 * warps) or D % (16 * warps):
        warps //= 2
    while 2 * tokens * max(D, F) > STAGED_BYTES:
        tokens //= 2
    defines = CONFIG | {
        "D": D, "F": F, "E": E, "K_EXPERTS": K, "MAX_PAIRS": most * K, "TOKENS": tokens,
        "NVFP4": int(format == "nvfp4"), "GROUP": GROUPS[format], "WARPS": warps,
        "MIN_BLOCKS": blocks, "SHARED_BLOCKS": 0,
    }  # fmt: skip
    if D % (128 * defines["U"]) or F % (128 * defines["U"]):
        defines["U"] = 1
    return defines


def moe_routed_kernel(T: int, K: int, D: int, F: int, E: int, format: str) -> tuple:
    """The source for these sizes and its bytes of shared memory."""
    defines = plan(T, K, D, F, E, format)
    source = cuda.Source.of(TEXT, "moe_routed_kernel", defines, (DEVICE,))
    return source, shared_bytes(defines)


def shared_bytes(defines: dict[str, int]) -> int:
    """Of the staged tokens and the rings."""
    stage = defines["U"] * 16 * (128 // 2 + 128 // defines["GROUP"])
    tokens = 2 * defines["TOKENS"] * max(defines["D"], defines["F"])
    return tokens + defines["WARPS"] * defines["STAGES"] * stage


def launch(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, global_scale: Tensor | None, shared: Tensor | None, limit: float,
    first_expert: int, format: str, out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill out[0]; out[1] and out[2] are working memory.

    Scales of MXFP4 must be within 2^-64 and 2^65, which `dsv4.ops.moe.stack_experts` sees to.
    """
    sizes = check(
        x, ids, routing, w1, s1, w3, s3, w2, s2, global_scale, shared, limit, first_expert, format,
        out,
    )  # fmt: skip
    T, K, D, F, E = (sizes[c] for c in "TKDFE")
    if T > MAX_TOKENS:
        raise KernelUnavailable(f"{SPEC.name}: at most {MAX_TOKENS} tokens, got {T}")
    if T == 0:
        return
    check_aligned(16, x=x, w1=w1, w3=w3, w2=w2)
    check_aligned(8, s1=s1, s3=s3, s2=s2)
    source, num_bytes = moe_routed_kernel(T, K, D, F, E, format)
    kernel = cuda.load(source, x.device, num_bytes)
    counters = cuda.zeroed_counters(x.device, num_counters(K, D))
    g1, g3, g2 = (None, None, None) if global_scale is None else global_scale.unbind()
    y, hidden, partial = out
    threads = 32 * dict(source.defines)["WARPS"]
    tiles = min(T * K, E + T * K // dict(source.defines)["TOKENS"])  # at most
    units = num_units(tiles, D, F, threads)
    # Started when all before it is done: its blocks wait for each other, so all of them must fit on
    # the device, which `resident_blocks` knows of an empty one.
    kernel.launch(
        min(kernel.resident_blocks(threads), units), threads, x, ids, routing, w1, s1, w3, s3,
        w2, s2, g1, g3, g2, shared, y, hidden, partial, counters, T, first_expert, float(limit),
    )  # fmt: skip


def num_units(tiles: int, D: int, F: int, threads: int) -> int:
    """Units of gate and up or of down, whichever has more: beyond that, blocks have no work."""
    return tiles * max(F // 8, D // 16) * 32 // threads


def num_counters(K: int, D: int) -> int:
    """Counters that a launch finds zero, and leaves so; for all numbers of tokens the same."""
    return 2 + MAX_TOKENS * K + D // 16


def sources() -> list[tuple[cuda.Source, str]]:
    """What is compiled ahead of time, with the instruction each must hold."""
    shapes = ((4096, 2048, 256), (7168, 3072, 384), (256, 128, 16))
    return [
        (moe_routed_kernel(T, 6, D, F, E, format)[0], "HMMA.16816")
        for D, F, E in shapes for T in (1, 8, 64) for format in GROUPS
    ]  # fmt: skip


SPEC = KernelSpec("moe_routed/sm90", launch, arch=(9,), requires=cuda.why_not)
