"""Routed experts. `python -m benchmarks.kernels.bench_moe [--json PATH | --sweep]`

Shapes of V4-Flash: 256 experts, top 6, uniform routing that is new for every call. The bytes are
those of the experts hit; from 8192 tokens on the matrix units are the roof. The baseline is torch's
grouped product on BF16 weights; of `moe_with_shared`, which has the shared expert's bytes too, the
four launches that it stands for. `--sweep` times the tiles of `SWEEP` instead, kernel by kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F_
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dsv4.kernels.moe import moe_routed_grouped as grouped
from dsv4.kernels.moe import moe_routed_w4a8
from dsv4.ops import moe as ops
from dsv4.ops.activation import gate_up_swiglu
from dsv4.ops.linear import linear_fp8
from dsv4.testing.bench import Case, cold_us, run
from dsv4.testing.cases.moe import MoeCase

D, F, E, K = 4096, 2048, 256, 6
CALLS = {1: 24, 4: 16, 8: 8, 16: 4, 64: 4, 256: 2, 1024: 2, 8192: 2, 32768: 1}
LARGE, LARGEST = 8192, 32768
FEWEST_W4A8 = 256  # tokens; fewer are the decode kernel's
SHARED = ("gate_up", "gate_up_scale", "down", "down_scale")
# BM, BN, warps, stages
SWEEP = {
    "w4a16": ((128, 128, 8, 4), (128, 64, 4, 2), (64, 128, 8, 4), (64, 64, 4, 3), (32, 64, 4, 4),
              (16, 64, 4, 5)),
    "w4a8": ((64, 64, 4, 3), (64, 128, 8, 4), (32, 128, 8, 4), (32, 64, 4, 4), (16, 64, 4, 5),
             (128, 64, 4, 3)),
}  # fmt: skip


def grouped_mm(case: MoeCase, w13: Tensor, w2: Tensor) -> Any:
    """The same layer by torch._grouped_mm on BF16 weights, routing lists included."""

    def call() -> Tensor:
        ids = case.ids.flatten().long()
        order = ids.argsort(stable=True)
        ends = torch.zeros(E, dtype=torch.int32, device="cuda")
        ends = ends.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        ends = ends.cumsum(0, dtype=torch.int32)
        rows = case.x[order // K]
        gate, up = torch._grouped_mm(rows, w13, ends).chunk(2, dim=-1)
        hidden = F_.silu(gate.clamp(max=10)) * up.clamp(-10, 10)
        y = torch._grouped_mm(hidden, w2, ends) * case.routing.flatten()[order, None]
        out = torch.zeros_like(case.x, dtype=torch.float32)
        return out.index_add_(0, order // K, y.float())

    return call


def token_cases(weights: MoeCase, T: int, count: int) -> list[MoeCase]:
    """The same weights with other tokens and routing."""
    made = []
    for seed in range(count):
        tokens = MoeCase.random(T, D, 128, E, format=weights.format, device="cuda", seed=seed)
        made.append(
            replace(
                weights, x=tokens.x, ids=tokens.ids, routing=tokens.routing, shared=tokens.shared
            )
        )
    return made


def cases() -> Iterator[Case]:
    """Every row of this file."""
    yield shared_case()
    w13 = torch.randn(E, 2 * F, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    w2 = torch.randn(E, D, F, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    for format in ("mxfp4", "nvfp4"):
        weights = MoeCase.random(1, D, F, E, format=format, device="cuda")
        for T, count in CALLS.items():
            if T == LARGEST and format == "nvfp4":
                continue  # minutes, and the same as 8192
            made = token_cases(weights, T, count)
            calls = {"w4a16": [partial(ops.moe_routed, **c.args()) for c in made]}
            if format == "mxfp4" and T >= FEWEST_W4A8:
                calls["w4a8"] = [partial(ops.moe_routed_w4a8, **c.args_w4a8()) for c in made]
            for mode, timed in calls.items():
                yield Case(
                    "moe_routed", {"M": T, "format": format, "mode": mode}, timed,
                    sum(c.nbytes for c in made) // count, flops=6 * T * K * D * F,
                    is_compute=T >= LARGE, baseline="torch._grouped_mm BF16",
                    baseline_calls=[grouped_mm(c, w13, w2) for c in made],
                )  # fmt: skip


def shared_case() -> Case:
    """moe_with_shared: all experts of a layer, one token."""
    weights = MoeCase.random(1, D, F, E, has_shared=False, device="cuda")
    drawn = weights.args_with_shared()
    shared = [{name: drawn[name].clone() for name in SHARED} for _ in range(4)]  # beyond L2
    shared_bytes = sum(x.nbytes for x in shared[0].values())
    made = token_cases(weights, 1, CALLS[1])
    args = [{k: v for k, v in c.args().items() if k != "shared"} for c in made]
    pairs = [(a, shared[i % len(shared)]) for i, a in enumerate(args)]
    return Case(
        "moe_with_shared", {"M": 1, "format": "mxfp4"},
        [partial(ops.moe_with_shared, **a, **s, after_router=False) for a, s in pairs],
        sum(c.nbytes for c in made) // len(made) + shared_bytes, flops=6 * (K + 1) * D * F,
        baseline="its parts", baseline_calls=[partial(in_parts, a, s) for a, s in pairs],
    )  # fmt: skip


def in_parts(routed: dict[str, Any], shared: dict[str, Tensor]) -> Tensor:
    """moe_with_shared as four launches."""
    gate_up, gate_up_scale, down, down_scale = (shared[name] for name in SHARED)
    hidden = gate_up_swiglu(linear_fp8(routed["x"], gate_up, gate_up_scale), routed["limit"])
    return ops.moe_routed(**routed, shared=linear_fp8(hidden, down, down_scale))


def sweep() -> None:
    """Microseconds of every tile at three sizes, whole and by kernel, MXFP4."""
    weights = MoeCase.random(1, D, F, E, device="cuda")
    for T in (256, 1024, LARGE):
        (case,) = token_cases(weights, T, 1)
        calls = {
            "w4a16": (grouped, partial(ops.moe_routed, **case.args())),
            "w4a8": (moe_routed_w4a8, partial(ops.moe_routed_w4a8, **case.args_w4a8())),
        }
        for mode, (kernel, call) in calls.items():
            for tile in SWEEP[mode]:
                names = "BM", "BN", "num_warps", "STAGES"
                setattr(kernel, "CONFIG", {1 << 40: dict(zip(names, tile, strict=True))})  # noqa: B010
                us = cold_us([call], case.nbytes)
                print(f"{mode} M={T} {tile} {us:.0f} us {6e-6 * T * K * D * F / us:.0f} TFLOP/s")
                with profile(activities=[ProfilerActivity.CUDA]) as seen:
                    call()
                    torch.cuda.synchronize()
                for event in seen.key_averages():
                    print(f"    {event.key[:60]:60} {event.self_device_time_total:9.0f} us")


if __name__ == "__main__":
    if sys.argv[1:] == ["--sweep"]:
        sweep()
    else:
        run(cases(), "Routed experts at the shapes of V4-Flash")
