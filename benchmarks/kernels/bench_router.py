"""Router kernels. `python -m benchmarks.kernels.bench_router [--json PATH] [--only OP]`

The baselines are torch.compile of the oracle; for the lists, whose oracle reads sizes back to the
host, a stable sort and the search for each expert's first row.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.ops import router as ops
from dsv4.reference import routing as oracle
from dsv4.testing.bench import COLD_BYTES, Case, nbytes, run
from dsv4.testing.cases.router import (
    FLASH,
    PRO,
    SCALING,
    VOCAB,
    distinct_experts,
    hash_table,
    router_logits,
)

TOKENS = 1, 8, 64, 1024, 8192
MAX_COPIES = 32


def copies(num_bytes: int) -> int:
    """Sets of buffers to go round: enough to exceed L2, within reason."""
    return max(1, min(MAX_COPIES, -(-COLD_BYTES // num_bytes)))


def sorted_lists(experts: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Rows by expert and where each expert starts."""
    ordered, rows = experts.flatten().sort(stable=True)
    return rows, torch.searchsorted(ordered, torch.arange(E + 1, device=ordered.device))


def topk_cases(E: int, K: int) -> Iterator[Case]:
    baseline: Callable[..., Any] = torch.compile(oracle.router_topk, dynamic=False)
    for T in TOKENS:
        num_bytes = 4 * T * E + 4 * E + 8 * T * K
        made = [router_logits(T, E, i, "cuda") for i in range(copies(num_bytes))]
        args = [(*pair, K, SCALING) for pair in made]
        yield Case(
            "router_topk", {"T": T, "E": E, "K": K}, [partial(ops.router_topk, *a) for a in args],
            num_bytes, baseline="torch.compile",
            baseline_calls=[partial(baseline, *a) for a in args] if FLASH[0] == E else [],
        )  # fmt: skip


def hash_cases(E: int, K: int) -> Iterator[Case]:
    baseline: Callable[..., Any] = torch.compile(oracle.router_hash, dynamic=False)
    table = hash_table(VOCAB, E, K, device="cuda")
    for T in TOKENS:
        # A token reads six logits of 32 bytes each, as device memory gives them.
        num_bytes = T * (8 + 4 * K + 32 * K + 8 * K)
        args = []
        for i in range(copies(num_bytes)):
            tokens = torch.randint(0, VOCAB, (T,), device="cuda")
            args.append((router_logits(T, E, i, "cuda")[0], table, tokens, SCALING))
        yield Case(
            "router_hash", {"T": T, "E": E, "K": K}, [partial(ops.router_hash, *a) for a in args],
            num_bytes, baseline="torch.compile",
            baseline_calls=[partial(baseline, *a) for a in args],
        )  # fmt: skip


def align_cases(E: int, K: int) -> Iterator[Case]:
    for T in (*TOKENS, 32768):
        block = 16 if T <= 64 else 64
        experts = [distinct_experts(T, E, K, i, "cuda") for i in range(8)]
        num_bytes = nbytes(experts[0], *ops.moe_align(experts[0], 0, E, block))
        yield Case(
            "moe_align", {"T": T, "E": E, "K": K, "block": block},
            [partial(ops.moe_align, x, 0, E, block) for x in experts], num_bytes,
            baseline="torch sort", baseline_calls=[partial(sorted_lists, x, E) for x in experts],
        )  # fmt: skip


def cases() -> Iterator[Case]:
    """Every row of this file."""
    for E, K in (FLASH, PRO):
        yield from topk_cases(E, K)
    yield from hash_cases(*FLASH)
    for E, K in (FLASH, PRO):
        yield from align_cases(E, K)


if __name__ == "__main__":
    run(cases(), "Router kernels at the shapes of V4-Flash and V4-Pro")
