"""Router kernels. `python -m benchmarks.kernels.bench_router [--json PATH] [--only OP]`

The baselines are torch.compile of the oracle; for the lists, whose oracle reads sizes back to the
host, of a stable sort and the search for each expert's first row.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.ops import router as ops
from dsv4.reference import routing as oracle
from dsv4.testing.bench import Case, CompiledOracle, Later, Turns, copies, later, nbytes, run
from dsv4.testing.cases.router import (
    FLASH,
    PRO,
    SCALING,
    VOCAB,
    distinct_experts,
    hash_table,
)

TOKENS = 8192, 1024, 64, 8, 1
MAX_COPIES = 32


def sorted_lists(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Rows by expert and where each expert starts."""
    ordered, rows = experts.flatten().sort(stable=True)
    each = torch.arange(num_experts + 1, device=ordered.device, dtype=ordered.dtype)
    return rows, torch.searchsorted(ordered, each)


def logits(T: int, E: int) -> Tensor:
    """Of the spread of dsv4.testing.cases.router, made on the device."""
    return 4 * torch.randn(T, E, device="cuda")


@later
def case(
    op: str, shape: dict[str, Any], args: list[dict[str, Any]], num_bytes: int,
    baseline: CompiledOracle | None,
) -> Case:  # fmt: skip
    """A case that goes round `args`."""
    calls = [partial(getattr(ops, op), **a) for a in args]
    if baseline is None:
        return Case(op, shape, calls, num_bytes)
    base = baseline.calls(args, shape["T"])
    return Case(op, shape, calls, num_bytes, baseline=baseline.NAME, baseline_calls=base)


def topk_cases(E: int, K: int) -> Iterator[Later]:
    baseline = CompiledOracle(oracle.router_topk) if FLASH[0] == E else None
    bias = 0.1 * torch.randn(E, device="cuda")
    for T in TOKENS:
        num_bytes = 4 * T * E + 4 * E + T + 8 * T * K
        rest = {"bias": bias, "k": K, "scaling": SCALING}
        rest["is_padding"] = torch.zeros(T, dtype=torch.bool, device="cuda")
        args = [{"logits": logits(T, E)} | rest for _ in range(copies(num_bytes, MAX_COPIES))]
        yield case("router_topk", {"T": T, "E": E, "K": K}, args, num_bytes, baseline)


def hash_cases(E: int, K: int) -> Iterator[Later]:
    baseline = CompiledOracle(oracle.router_hash)
    table = hash_table(VOCAB, E, K, device="cuda")
    for T in TOKENS:
        # A token reads six logits of 32 bytes each, as device memory gives them.
        num_bytes = T * (8 + 4 * K + 32 * K + 8 * K)
        args = []
        for _ in range(copies(num_bytes, MAX_COPIES)):
            tokens = torch.randint(0, VOCAB, (T,), device="cuda")
            given = {"tid2eid": table, "token_ids": tokens, "scaling": SCALING}
            args.append({"logits": logits(T, E)} | given)
        yield case("router_hash", {"T": T, "E": E, "K": K}, args, num_bytes, baseline)


@later
def align_case(T: int, E: int, K: int, baseline: CompiledOracle) -> Case:
    block = 16 if T <= 64 else 64
    experts = [distinct_experts(T, E, K, i, "cuda") for i in range(8)]
    num_bytes = nbytes(experts[0], *ops.moe_align(experts[0], 0, E, block))
    shape: dict[str, Any] = {"T": T, "E": E, "K": K, "block": block}
    calls = [partial(ops.moe_align, x, 0, E, block) for x in experts]
    base = baseline.calls([{"experts": x, "num_experts": E} for x in experts], T)
    return Case(
        "moe_align", shape, calls, num_bytes, baseline=f"{baseline.NAME} of a sort",
        baseline_calls=base,
    )  # fmt: skip


def align_cases(E: int, K: int) -> Iterator[Later]:
    baseline = CompiledOracle(sorted_lists)
    for T in (32768, *TOKENS):
        yield align_case(T, E, K, baseline)


def cases() -> Turns:
    """Every row of this file."""
    for E, K in (FLASH, PRO):
        yield topk_cases(E, K)
    yield hash_cases(*FLASH)
    for E, K in (FLASH, PRO):
        yield align_cases(E, K)


if __name__ == "__main__":
    run(cases(), "Router kernels at the shapes of V4-Flash and V4-Pro")
