"""Routed experts and the shared one of one token in one launch on Hopper.

The shared expert's matrices, FP8 as the linears have them, are the work of blocks of their own,
with as many bytes each as the others have. In a chain of small kernels they would not fill the
memory bus. Bits are those of linear_fp8, gate_up_swiglu, linear_fp8 and moe_routed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.core.errors import KernelUnavailable
from dsv4.kernels.common import cuda
from dsv4.kernels.common.checks import check_aligned
from dsv4.kernels.common.linear_device import DEVICE
from dsv4.kernels.common.linear_plan import BLOCK, check_scale, cut
from dsv4.kernels.moe import moe_routed as portable
from dsv4.kernels.moe import moe_routed_sm90 as routed

REFERENCE = "dsv4.reference.experts:moe_with_shared"
CONFIG = routed.CONFIG
SCALES = torch.float8_e8m0fnu, torch.float32


@cache
def plan(D: int, F: int) -> dict[str, int] | None:
    """What the source has to know of the shared expert; None if its columns have no halves."""
    up, down = cut(2 * F, D), cut(D, F)
    for c, K in ((up, D), (down, F)):
        if c.num_chunks % 2 or c.chunk * c.num_chunks * BLOCK != K:
            return None
    warps = routed.PLANS[1][1]
    if D % 512 or F % 512 or CONFIG["U"] != 2 or 2 * max(D, F) > routed.STAGED_BYTES:
        return None
    sums = warps * max(up.num_chunks, down.num_chunks) // 2 * 32 * 8
    return {
        "SHARED_BLOCKS": F // (4 * warps), "UP_CHUNK": up.chunk, "DOWN_CHUNK": down.chunk,
        "SUMS_BYTES": sums,
    }  # fmt: skip


def takes(x: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down_scale: Tensor) -> bool:
    """Whether there is one token, and a plan for the shared expert."""
    if len(x) != 1 or gate_up_scale.dtype != down_scale.dtype or gate_up_scale.dtype not in SCALES:
        return False
    return plan(x.shape[1], len(gate_up) // 2) is not None


@cache
def moe_with_shared_kernel(
    K: int, D: int, F: int, E: int, format: str, scale: torch.dtype
) -> tuple[cuda.Source, int]:
    """The source for these sizes and its bytes of shared memory."""
    own = plan(D, F)
    assert own is not None
    defines = routed.plan(1, K, D, F, E, format) | own | {"SCALE_BYTES_FP8": scale.itemsize}
    path = Path(__file__).with_suffix(".cu")
    source = cuda.Source.of(path, "moe_with_shared_kernel", defines, (DEVICE, routed.TEXT))
    return source, routed.shared_bytes(defines) + own["SUMS_BYTES"]


def num_blocks(resident: int, shared: int, units: int) -> int:
    """Blocks of a launch: `shared` of the shared expert, up to `units` of the routed ones.

    They wait for each other, so all must run at once: at most `resident`, those that an empty
    device holds. The router's own, where they run still, are few, wait for none of these, and end.
    """
    if resident <= shared:
        raise KernelUnavailable(
            f"{SPEC.name}: expected a device that holds more than the {shared} blocks of the "
            f"shared expert at once, got {resident}: call linear_fp8, gate_up_swiglu and "
            'moe_routed, as the engine does with unfused=["moe_with_shared"]'
        )
    return min(resident, shared + units)


def outputs(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, global_scale: Tensor | None, gate_up: Tensor, gate_up_scale: Tensor,
    down: Tensor, down_scale: Tensor, limit: float, first_expert: int, format: str,
    after_router: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The result, and working memory as for moe_routed, with a row of the shared expert behind."""
    rows, F = ids.numel() + len(x), len(gate_up) // 2
    partial = x.new_empty(rows, x.shape[1], dtype=torch.float32)
    return torch.empty_like(x), x.new_empty(rows, F), partial


def launch(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, global_scale: Tensor | None, gate_up: Tensor, gate_up_scale: Tensor,
    down: Tensor, down_scale: Tensor, limit: float, first_expert: int, format: str,
    after_router: bool, out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill out[0]; out[1] and out[2] are working memory."""
    y, hidden, partial = out
    pairs, stored = ids.numel(), (x, ids, routing, w1, s1, w3, s3, w2, s2)
    sizes = portable.check(
        *stored, global_scale, None, limit, first_expert, format,
        (y, hidden[:pairs], partial[:pairs]),
    )  # fmt: skip
    T, K, D, F, E = (sizes[c] for c in "TKDFE")
    fp8, shared = torch.float8_e4m3fn, (gate_up, gate_up_scale, down, down_scale)
    scale = check_scale("gate_up_scale", gate_up_scale, 2 * F, D)
    down_dtype = check_scale("down_scale", down_scale, D, F)
    check_tensors(
        x=(x, f"{T} {D}", x.dtype), gate_up=(gate_up, f"{2 * F} {D}", fp8),
        gate_up_scale=(gate_up_scale, "up_rows up_blocks", scale), down=(down, f"{D} {F}", fp8),
        down_scale=(down_scale, "down_rows down_blocks", down_dtype),
        hidden=(hidden, f"{pairs + T} {F}", x.dtype),
        partial=(partial, f"{pairs + T} {D}", torch.float32),
    )  # fmt: skip
    if not takes(x, gate_up, gate_up_scale, down_scale):
        raise KernelUnavailable(
            f"{SPEC.name}: expected one token, and a shared expert whose columns have halves of "
            f"whole chunks, got {T} tokens and [{2 * F}, {D}], [{D}, {F}] with scales of "
            f"{gate_up_scale.dtype} and {down_scale.dtype}: call torch.ops.dsv4.moe_with_shared"
        )
    check_aligned(16, x=x, w1=w1, w3=w3, w2=w2, gate_up=gate_up, down=down)
    check_aligned(8, s1=s1, s3=s3, s2=s2, gate_up_scale=gate_up_scale, down_scale=down_scale)
    source, num_bytes = moe_with_shared_kernel(K, D, F, E, format, scale)
    kernel, made = cuda.load(source, x.device, num_bytes), dict(source.defines)
    threads = 32 * made["WARPS"]
    units = min(K, E) * max(F // 8, D // 16) * 32 // threads  # of the routed experts, at most
    grid = num_blocks(kernel.resident_blocks(threads), made["SHARED_BLOCKS"], units)
    counters = cuda.zeroed_counters(x.device, routed.num_counters(K, D))
    scales = (None, None, None) if global_scale is None else global_scale.unbind()
    kernel.launch(
        grid, threads, *stored, *scales, *shared, *out, counters, first_expert, float(limit),
        overlaps=after_router,
    )  # fmt: skip


def sources() -> list[tuple[cuda.Source, str]]:
    """What is compiled ahead of time, with the instruction each must hold."""
    shapes = ((4096, 2048, 256), (7168, 3072, 384))
    return [
        (moe_with_shared_kernel(6, D, F, E, format, scale)[0], "HMMA.16816")
        for D, F, E in shapes for format in portable.GROUPS for scale in SCALES
    ]  # fmt: skip


SPEC = KernelSpec("moe_with_shared/sm90", launch, arch=(9,), requires=cuda.why_not)
