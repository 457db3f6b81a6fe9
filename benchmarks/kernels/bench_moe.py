"""Routed experts. `python -m benchmarks.kernels.bench_moe [--json PATH]`

Shapes of V4-Flash: 256 experts, top 6, uniform routing that is new for every call. The bytes are
those of the experts hit. The baseline is torch's grouped product on BF16 weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F_
from torch import Tensor

from dsv4.ops import moe as ops
from dsv4.testing.bench import Case, run
from dsv4.testing.cases.moe import MoeCase

D, F, E, K = 4096, 2048, 256, 6
CALLS = {1: 24, 4: 16, 8: 8, 16: 4, 64: 4}


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


def cases() -> Iterator[Case]:
    """Every row of this file."""
    w13 = torch.randn(E, 2 * F, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    w2 = torch.randn(E, D, F, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    for format in ("mxfp4", "nvfp4"):
        weights = MoeCase.random(1, D, F, E, format=format, device="cuda")
        for T, count in CALLS.items():
            made = []
            for seed in range(count):
                tokens = MoeCase.random(T, D, 128, E, format=format, device="cuda", seed=seed)
                made.append(
                    replace(
                        weights, x=tokens.x, ids=tokens.ids, routing=tokens.routing,
                        shared=tokens.shared,
                    )
                )  # fmt: skip
            nbytes = sum(c.nbytes for c in made) // count
            yield Case(
                "moe_routed", {"M": T, "format": format, "mode": "w4a16"},
                [partial(ops.moe_routed, **c.args()) for c in made], nbytes,
                flops=6 * T * K * D * F, baseline="torch._grouped_mm BF16",
                baseline_calls=[grouped_mm(c, w13, w2) for c in made],
            )  # fmt: skip


if __name__ == "__main__":
    run(cases(), "Routed experts at the shapes of V4-Flash")
