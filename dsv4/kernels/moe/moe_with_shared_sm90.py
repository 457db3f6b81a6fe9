"""Routed experts and the shared one of one token in one launch on Hopper.

The shared expert's matrices, FP8 as the linears have them, are the work of blocks of their own,
with as many bytes each as the others have. In a chain of small kernels they would not fill the
memory bus. Bits are those of linear_fp8, gate_up_swiglu, linear_fp8 and moe_routed.
"""

from __future__ import annotations

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
from dsv4.kernels.moe.moe_routed import ROWS

REFERENCE = "dsv4.reference.experts:moe_with_shared"
CONFIG = routed.CONFIG
SCALES = torch.float8_e8m0fnu, torch.float32  # in which those of the linears come


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


def why_not(x: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down_scale: Tensor) -> str | None:
    """Why these need the four launches that this one stands for, or None."""
    T, D, F = *x.shape, len(gate_up) // 2
    if T != 1:
        return f"x: expected one token, got {T}"
    if gate_up_scale.dtype != down_scale.dtype:
        return (
            f"down_scale: expected {gate_up_scale.dtype} as gate_up_scale, got {down_scale.dtype}"
        )
    if (own := plan(D, F)) is None:
        return f"gate_up: expected columns that have halves of whole chunks, got {D} and {F}"
    if x.is_cuda:  # blocks wait for each other, and more than half must be the routed experts'
        fit = routed.PLANS[1][2] * torch.cuda.get_device_properties(x.device).multi_processor_count
        if fit < (needed := 2 * own["SHARED_BLOCKS"]):
            return f"x: expected a device that holds {needed} blocks at once, this one: {fit}"
    return None


def check_shared(
    x: Tensor, w1: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> None:
    """Check the shared expert's matrices: as wide as a routed expert, w1 [E, F / 8, ..]."""
    check_tensors(x=(x, "T D", torch.bfloat16), w1=(w1, "E tiles columns 8 64", torch.uint8))
    D, F, fp8 = x.shape[1], w1.shape[1] * ROWS, torch.float8_e4m3fn
    up_dtype = check_scale("gate_up_scale", gate_up_scale, 2 * F, D)
    down_dtype = check_scale("down_scale", down_scale, D, F)
    check_tensors(
        x=(x, "T D", x.dtype), gate_up=(gate_up, f"{2 * F} {D}", fp8),
        gate_up_scale=(gate_up_scale, "up_rows up_blocks", up_dtype),
        down=(down, f"{D} {F}", fp8), down_scale=(down_scale, "down_rows down_blocks", down_dtype),
    )  # fmt: skip


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
            'moe_routed, as the engine does with unfused=["moe_with_shared"] (--no-fusion '
            "moe_with_shared)"
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
    pairs, routed_args = ids.numel(), (x, ids, routing, w1, s1, w3, s3, w2, s2)
    check_shared(x, w1, gate_up, gate_up_scale, down, down_scale)
    sizes = portable.check(
        *routed_args, global_scale, None, limit, first_expert, format,
        (y, hidden[:pairs], partial[:pairs]),
    )  # fmt: skip
    T, K, D, F, E = (sizes[c] for c in "TKDFE")
    check_tensors(
        x=(x, "T D", x.dtype), hidden=(hidden, f"{pairs + T} {F}", x.dtype),
        partial=(partial, f"{pairs + T} {D}", torch.float32),
    )  # fmt: skip
    if reason := why_not(x, gate_up, gate_up_scale, down_scale):
        raise KernelUnavailable(f"{SPEC.name}: {reason}: call torch.ops.dsv4.moe_with_shared")
    check_aligned(16, x=x, w1=w1, w3=w3, w2=w2, gate_up=gate_up, down=down)
    check_aligned(8, s1=s1, s3=s3, s2=s2, gate_up_scale=gate_up_scale, down_scale=down_scale)
    source, num_bytes = moe_with_shared_kernel(K, D, F, E, format, gate_up_scale.dtype)
    kernel, made = cuda.load(source, x.device, num_bytes), dict(source.defines)
    threads = 32 * made["WARPS"]
    units = routed.num_units(min(K, E), D, F, threads)
    grid = num_blocks(kernel.resident_blocks(threads), made["SHARED_BLOCKS"], units)
    counters = cuda.zeroed_counters(x.device, routed.num_counters(K, D))
    scales = (None, None, None) if global_scale is None else global_scale.unbind()
    kernel.launch(
        grid, threads, *routed_args, *scales, gate_up, gate_up_scale, down, down_scale, *out,
        counters, first_expert, float(limit), overlaps=after_router,
    )  # fmt: skip


def sources() -> list[tuple[cuda.Source, str]]:
    """What is compiled ahead of time, with the instruction each must hold."""
    shapes = ((4096, 2048, 256), (7168, 3072, 384))
    return [
        (moe_with_shared_kernel(6, D, F, E, format, scale)[0], "HMMA.16816")
        for D, F, E in shapes for format in portable.GROUPS for scale in SCALES
    ]  # fmt: skip


SPEC = KernelSpec("moe_with_shared/sm90", launch, arch=(9,), requires=cuda.why_not)
