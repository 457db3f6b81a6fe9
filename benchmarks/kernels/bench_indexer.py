"""Indexer scores and top-k. `python -m benchmarks.kernels.bench_indexer [--json PATH] [--only OP]`

Decode has one query for each request; the last tokens of a prompt are one request with T queries.
The baseline reads dense BF16 keys, so it is spared the pages and the formats: matmul, ReLU,
weighted sum, torch.topk and a sort of its result, compiled.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.core.kv_layout import INDEX_KEYS, IndexRecord
from dsv4.ops import indexer as ops
from dsv4.testing.bench import COLD_BYTES, Case, run
from dsv4.testing.cases.indexer import RATIO, indexer_case

HEADS, J, PER_PAGE = 64, 128, 64
MAX_COPIES = 24
DECODE = [(B, context) for B in (1, 64) for context in (8192, 32768, 131072, 1048576)]
PREFILL = [(1024, context) for context in (8192, 32768)]


@partial(torch.compile, dynamic=True)
def dense_scores_topk(q: Tensor, weights: Tensor, keys: Tensor, topk: int) -> Tensor:
    """q [B, T, I, J], weights [B, T, I], keys [B, S, J] -> [B, T, topk]."""
    dots = q.flatten(1, 2) @ keys.transpose(1, 2)
    scores = (dots.unflatten(1, (q.shape[1], HEADS)).relu() * weights[..., None]).sum(2)
    return scores.topk(topk, dim=-1).indices.sort(dim=-1).values


def baseline_calls(B: int, T: int, S: int, topk: int, copies: int) -> list[Any]:
    """Calls of the baseline on keys of their own."""
    q = torch.randn(B, T, HEADS, J, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(B, T, HEADS, device="cuda")
    keys = [
        torch.randn(B, S, J, device="cuda", dtype=torch.bfloat16)
        for _ in range(max(copies // 2, 1))
    ]
    return [partial(dense_scores_topk, q, weights, k, topk) for k in keys]


def case(B: int, T: int, context: int, topk: int, keys: Any) -> Case:
    """B requests with T queries each at the end of `context` tokens."""
    S = context // RATIO
    num_bytes = B * (S * IndexRecord(J, keys).nbytes + T * (2 * HEADS * J + 4 * HEADS + 4 * topk))
    copies = max(1, min(MAX_COPIES, -(-COLD_BYTES // num_bytes)))
    made = [
        indexer_case(
            [(context - T, T)] * B, topk, keys, num_heads=HEADS, entries_per_page=PER_PAGE,
            rope_dim=64, seed=i, device="cuda",
        )
        for i in range(copies)
    ]  # fmt: skip
    calls = [partial(ops.indexer_scores_topk, **m.args()) for m in made]
    visible = sum((context - T + t + 1) // RATIO for t in range(T))
    shape: dict[str, Any] = {"B": B, "context": context, "topk": topk, "keys": keys}
    return Case(
        "indexer_scores_topk", shape if T == 1 else {**shape, "T": T}, calls, num_bytes,
        flops=2 * B * visible * HEADS * J, is_compute=T > 1, baseline="torch BF16",
        baseline_calls=baseline_calls(B, T, S, topk, copies),
    )  # fmt: skip


def select_case(T: int, S: int, topk: int) -> Case:
    """Choice alone, beside torch.topk."""
    num_bytes = 4 * T * (S + topk)
    copies = max(1, min(MAX_COPIES, -(-COLD_BYTES // num_bytes)))
    scores = [torch.randn(T, S, device="cuda") for _ in range(copies)]
    lengths = torch.full((T,), S, device="cuda")
    return Case(
        "topk_select", {"T": T, "S": S, "topk": topk},
        [partial(ops.topk_select, x, lengths, topk) for x in scores], num_bytes,
        baseline="torch.topk", baseline_calls=[partial(torch.topk, x, topk) for x in scores],
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Every row of this file."""
    for T, S in ((1, 2048), (1, 8192), (64, 8192), (1, 32768), (64, 32768), (1, 262144)):
        yield select_case(T, S, 512)
    for keys in INDEX_KEYS:
        for B, context in DECODE:
            yield case(B, 1, context, 512, keys)
        for B in (1, 64):
            yield case(B, 1, 32768, 1024, keys)
        for T, context in PREFILL:
            yield case(1, T, context, 512, keys)


if __name__ == "__main__":
    run(cases(), "Indexer at the shapes of V4-Flash, and top-1024 of V4-Pro")
