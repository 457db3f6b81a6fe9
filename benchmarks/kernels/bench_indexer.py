"""Indexer scores and top-k. `python -m benchmarks.kernels.bench_indexer [--json PATH] [--only OP]`

Decode has one query for each request; the last tokens of a prompt are one request with T queries.
The baseline reads dense BF16 keys, so it is spared the pages and the formats: matmul, ReLU,
weighted sum, torch.topk and a sort of its result, compiled. `indexer_queries`, `indexer_scores` and
`topk_select` are the parts of `indexer_scores_topk`. Rows with a `kernel` in their shape are of the
choice in Triton, which Hopper does not take.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.core.kv_layout import INDEX_KEYS, IndexRecord
from dsv4.kernels.indexer import indexer_scores_topk as portable
from dsv4.kernels.indexer import topk_select
from dsv4.ops import indexer as ops
from dsv4.testing.bench import COLD_BYTES, Case, Later, later, run
from dsv4.testing.cases.indexer import RATIO, IndexerCase, indexer_case

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


def step_cases(
    B: int, T: int, context: int, topk: int, keys: Any, num_bytes: int
) -> list[IndexerCase]:
    """B requests with T queries each at the end of `context` tokens, as often as exceeds L2."""
    return [
        indexer_case(
            [(context - T, T)] * B, topk, keys, num_heads=HEADS, entries_per_page=PER_PAGE,
            rope_dim=64, seed=i, device="cuda",
        )
        for i in range(max(1, min(MAX_COPIES, -(-COLD_BYTES // num_bytes))))
    ]  # fmt: skip


def launches(kernel: Any, args: dict[str, Any]) -> Any:
    """A call of a kernel that the op does not take."""
    return partial(kernel.launch, **args, out=kernel.outputs(**args))


@later
def case(B: int, T: int, context: int, topk: int, keys: Any, kernel: str = "") -> Case:
    """The op, or its portable kernel."""
    S = context // RATIO
    num_bytes = B * (S * IndexRecord(J, keys).nbytes + T * (2 * HEADS * J + 4 * HEADS + 4 * topk))
    made = step_cases(B, T, context, topk, keys, num_bytes)
    calls = [
        launches(portable, m.args()) if kernel else partial(ops.indexer_scores_topk, **m.args())
        for m in made
    ]
    visible = sum((context - T + t + 1) // RATIO for t in range(T))
    shape: dict[str, Any] = {"B": B, "context": context, "topk": topk, "keys": keys}
    shape |= ({"T": T} if T > 1 else {}) | ({"kernel": kernel} if kernel else {})
    baseline = [] if kernel else baseline_calls(B, T, S, topk, len(made))
    return Case(
        "indexer_scores_topk", shape, calls, num_bytes, flops=2 * B * visible * HEADS * J,
        is_compute=T > 1, baseline="torch BF16" if baseline else None, baseline_calls=baseline,
    )  # fmt: skip


@later
def queries_case(B: int, keys: Any) -> Case:
    """The first part: RoPE, rotation and rounding of one query of each request."""
    num_bytes = B * (4 * HEADS * J + 8 * HEADS)
    calls = []
    for made in step_cases(B, 1, 8192, 8192 // RATIO, keys, num_bytes):
        args = made.args()  # all entries are chosen: no scores
        out = portable.outputs(**args)
        calls.append(partial(portable.launch_with, lambda *_, **__: None, **args, out=out))
    return Case("indexer_queries", {"B": B, "keys": keys}, calls, num_bytes)


@later
def scores_case(B: int, context: int, keys: Any) -> Case:
    """The second part, of queries that are ready."""
    S = context // RATIO
    num_bytes = B * (S * (IndexRecord(J, keys).nbytes + 4) + 2 * HEADS * J + 4 * HEADS)
    calls = []
    for made in step_cases(B, 1, context, 512, keys, num_bytes):
        args = made.args()
        out = portable.outputs(**args)
        portable.launch(**args, out=out)
        _, query, weights, _, scores, *_ = out
        calls.append(
            partial(
                portable._launch_scores, query, weights, made.slot, made.position, made.pages,
                made.page_table, scores, RATIO, PER_PAGE, 512, keys,
            )
        )  # fmt: skip
    shape: dict[str, Any] = {"B": B, "context": context, "keys": keys}
    return Case("indexer_scores", shape, calls, num_bytes, flops=2 * B * S * HEADS * J)


@later
def select_case(T: int, S: int, topk: int, kernel: str = "") -> Case:
    """The last part, the choice, beside torch.topk."""
    num_bytes = 4 * T * (S + topk)
    copies = max(1, min(MAX_COPIES, -(-COLD_BYTES // num_bytes)))
    scores = [torch.randn(T, S, device="cuda") for _ in range(copies)]
    lengths = torch.full((T,), S, device="cuda")
    args = [{"scores": x, "lengths": lengths, "topk": topk} for x in scores]
    shape: dict[str, Any] = {"T": T, "S": S, "topk": topk}
    return Case(
        "topk_select", shape | ({"kernel": kernel} if kernel else {}),
        [launches(topk_select, a) if kernel else partial(ops.topk_select, **a) for a in args],
        num_bytes,
        baseline="torch.topk", baseline_calls=[partial(torch.topk, x, topk) for x in scores],
    )  # fmt: skip


def cases() -> Iterator[Later]:
    """Every row of this file."""
    for B, context in DECODE:
        for kernel in ("", "triton"):
            yield select_case(B, context // RATIO, 512, kernel)
    for keys in INDEX_KEYS:
        for B in (1, 64):
            yield queries_case(B, keys)
        for B, context in DECODE:
            yield case(B, 1, context, 512, keys)
            yield case(B, 1, context, 512, keys, "triton")
            yield scores_case(B, context, keys)
        for B in (1, 64):
            yield case(B, 1, 32768, 1024, keys)
        for T, context in PREFILL:
            yield case(1, T, context, 512, keys)


if __name__ == "__main__":
    run(cases(), "Indexer at the shapes of V4-Flash, and top-1024 of V4-Pro")
