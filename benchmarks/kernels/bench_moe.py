"""Routed experts. `python -m benchmarks.kernels.bench_moe [--json PATH | --sweep]`

Shapes of V4-Flash: 256 experts, top 6, uniform routing that is new for every call. The bytes are
those of the experts hit; from 8192 tokens on the matrix units are the roof. The baseline is torch's
grouped product on BF16 weights. `--sweep` times the tiles of `SWEEP` instead, kernel by kernel.
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
from dsv4.ops import moe as ops
from dsv4.testing.bench import Case, cold_us, run
from dsv4.testing.cases.moe import MoeCase

D, F, E, K = 4096, 2048, 256, 6
CALLS = {1: 24, 4: 16, 8: 8, 16: 4, 64: 4, 256: 2, 1024: 2, 8192: 2, 32768: 1}
LARGE = 8192
SWEEP = (
    {"BM": 128, "BN": 128, "num_warps": 8, "STAGES": 4},
    {"BM": 128, "BN": 128, "num_warps": 8, "STAGES": 3},
    {"BM": 128, "BN": 64, "num_warps": 4, "STAGES": 2},
    {"BM": 64, "BN": 128, "num_warps": 8, "STAGES": 4},
    {"BM": 64, "BN": 64, "num_warps": 4, "STAGES": 3},
    {"BM": 32, "BN": 128, "num_warps": 8, "STAGES": 4},
)


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
    w13 = torch.randn(E, 2 * F, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    w2 = torch.randn(E, D, F, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    for format in ("mxfp4", "nvfp4"):
        weights = MoeCase.random(1, D, F, E, format=format, device="cuda")
        for T, count in CALLS.items():
            made = token_cases(weights, T, count)
            yield Case(
                "moe_routed", {"M": T, "format": format, "mode": "w4a16"},
                [partial(ops.moe_routed, **c.args()) for c in made],
                sum(c.nbytes for c in made) // count, flops=6 * T * K * D * F,
                is_compute=T >= LARGE, baseline="torch._grouped_mm BF16",
                baseline_calls=[grouped_mm(c, w13, w2) for c in made],
            )  # fmt: skip


def sweep() -> None:
    """Microseconds of every tile at three sizes, whole and by kernel."""
    for format in ("mxfp4", "nvfp4"):
        weights = MoeCase.random(1, D, F, E, format=format, device="cuda")
        for T in (256, 1024, LARGE):
            (case,) = token_cases(weights, T, 1)
            call = partial(ops.moe_routed, **case.args())
            for tile in SWEEP:
                grouped.CONFIG = {1 << 40: tile}
                us = cold_us([call], case.nbytes)
                print(f"{format} M={T} {tile} {us:.0f} us {6e-6 * T * K * D * F / us:.0f} TFLOP/s")
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
