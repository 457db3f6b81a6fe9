"""Attention kernels. `python -m benchmarks.kernels.bench_attention [--json PATH] [--only OP]`

Decode: one token of each of B requests. CSA rows choose 512 or 1024 of twice as many entries, HCA
rows read all entries of 8K, 128K and 1M tokens. Prefill: T tokens of one request in the middle of a
prompt. The baseline, for some rows, is PyTorch's attention on the same keys, gathered in BF16
beforehand; of results in FP8 it is our attention and the cast after it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from dsv4.core.kv_layout import KvRecord
from dsv4.ops import attention as ops
from dsv4.ops.quant import fp8_act_quantize
from dsv4.testing.bench import COLD_BYTES, Call, Case, Turns, later, run
from dsv4.testing.cases.attention import AttentionCase

C, W = 512, 128
RECORD = KvRecord().nbytes
HEADS = (8, 16, 32, 64, 128)
BATCHES = (1, 4, 16, 64, 128, 256)
MAX_COPIES = 3  # of the buffers; where they fit into L2 it is swept between calls


def decode_case(B: int, H: int, entries: int, is_list: bool, seed: int) -> AttentionCase:
    """B requests whose windows are full and that see `entries`, or choose among twice as many."""
    ratio = 4 if is_list else 128
    tokens = entries * ratio * (2 if is_list else 1)
    return AttentionCase(
        [(tokens - 1, 1)] * B, H, C, W, ratio, 256 // ratio, entries if is_list else None, seed=seed
    )


def num_bytes(tokens: int, H: int, keys: int, stored: int) -> int:
    """Queries, results, and `stored` records read once."""
    return tokens * H * C * 2 * 2 + stored * RECORD + tokens * keys * 8


def dense_calls(B: int, H: int, keys: int, copies: int) -> list[Call]:
    """PyTorch's attention with one KV head, BF16."""
    calls = []
    for _ in range(copies):
        q = torch.randn(B, 1, H, C, device="cuda", dtype=torch.bfloat16)
        kv = torch.randn(B, 1, keys, C, device="cuda", dtype=torch.bfloat16)
        attention = torch.nn.functional.scaled_dot_product_attention
        calls.append(partial(attention, q, kv, kv))
    return calls


@later
def decode_row(B: int, H: int, entries: int, is_list: bool) -> Case:
    """One row; its buffers are as many as exceed L2, within reason."""
    keys = W + entries
    size = num_bytes(B, H, keys, B * keys)
    copies = max(1, min(MAX_COPIES, -(-COLD_BYTES // size)))
    calls = [
        partial(ops.sparse_attn_decode, **decode_case(B, H, entries, is_list, i).args("cuda"))
        for i in range(copies)
    ]
    shape: dict[str, int | str] = {"B": B, "H": H, "window": W, "entries": entries}
    shape |= {} if is_list else {"kind": "hca"}
    has_baseline = B in (1, 128) and H >= 64 and entries <= 1024
    dense: dict[str, Any] = {}
    if has_baseline:
        dense = {"baseline": "dense sdpa", "baseline_calls": dense_calls(B, H, keys, copies)}
    flops = 4 * B * H * keys * C
    return Case("sparse_attn_decode", shape, calls, size, flops, B * H >= 4096, **dense)


def decode_cases() -> Turns:
    for H in HEADS:
        for B in BATCHES:
            yield decode_row(B, H, 512, True)
            yield decode_row(B, H, 1024, True)
    for entries in (64, 1024, 8192):
        for H in HEADS:
            for B in BATCHES:
                yield decode_row(B, H, entries, False)


@later
def prefill_row(T: int, H: int, entries: int, is_list: bool = True) -> Case:
    """T tokens after as many as let each of them see `entries`."""
    ratio = 4 if is_list else 128
    before = entries * ratio * (2 if is_list else 1)
    keys, stored = W + entries, (before + T) // ratio + T + W
    made = AttentionCase(
        [(before, T)], H, C, W, ratio, 256 // ratio, entries if is_list else None
    )  # fmt: skip
    call = partial(ops.sparse_attn_prefill, **made.args("cuda"))
    shape: dict[str, int | str] = {"T": T, "H": H, "entries": entries}
    shape |= {} if is_list else {"kind": "hca"}
    flops, size = 4 * T * H * keys * C, num_bytes(T, H, keys if is_list else 0, stored)
    return Case("sparse_attn_prefill", shape, [call], size, flops, is_compute=True)


def prefill_cases() -> Turns:
    for T in (1024, 4096):
        yield prefill_row(T, 64, 512)
        yield prefill_row(T, 128, 1024)
        yield prefill_row(T, 64, 1024, is_list=False)
        yield prefill_row(T, 16, 512)


def fp8_row(name: str, made: AttentionCase, entries: int, stored: int) -> Case:
    """The result in FP8; the baseline is BF16 attention and the cast behind it."""
    args = made.args("cuda")
    T, H, _ = args["q"].shape
    attend, keys = getattr(ops, name), W + entries
    saved = T * H * (C - C // 128)  # against BF16
    return Case(
        f"{name}_fp8",
        {"T": T, "H": H, "entries": entries},
        [partial(getattr(ops, f"{name}_fp8"), **args)],
        num_bytes(T, H, keys, stored) - saved,
        4 * T * H * keys * C,
        is_compute=T * H >= 4096,
        baseline="BF16, then FP8",
        baseline_calls=[lambda: fp8_act_quantize(attend(**args))],
    )


def fp8_cases() -> Iterator[Case]:
    H, entries = 64, 512
    for B in (1, 128):
        made = decode_case(B, H, entries, True, 0)
        yield fp8_row("sparse_attn_decode", made, entries, B * (W + entries))
    before, T, ratio = 4096, 1024, 4
    made = AttentionCase([(before, T)], H, C, W, ratio, 64, entries)
    yield fp8_row("sparse_attn_prefill", made, entries, (before + T) // ratio + T + W)


def pack_cases() -> Iterator[Case]:
    for T in (1, 64, 4096):
        kv = [torch.randn(T, C, device="cuda").to(torch.bfloat16) for _ in range(MAX_COPIES)]
        calls = [partial(ops.kv_step_pack, x, 64) for x in kv]
        yield Case("kv_step_pack", {"T": T, "C": C}, calls, T * (2 * C + RECORD))


def cases() -> Turns:
    """Every row of this file."""
    yield decode_cases()
    yield prefill_cases()
    yield fp8_cases()
    yield pack_cases()


if __name__ == "__main__":
    run(cases(), "Sparse attention at the shapes of V4-Flash and V4-Pro")
