"""Cache kernels. `python -m benchmarks.kernels.bench_cache [--json PATH] [--only OP]`

Decode is the worst case: every request completes a window in the step; idle is a decode step in
which none does. The baseline is a device copy that moves as many bytes; of fused ops their parts.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from dsv4.core.kv_layout import IndexRecord, KvRecord
from dsv4.ops import cache as ops
from dsv4.testing.bench import COLD_BYTES, Case, copy_calls, run
from dsv4.testing.cases.cache import (
    CompressorCase,
    Span,
    WindowCase,
    compressor_case,
    insert_both_args,
    step_append_args,
)

DECODE, PREFILL = (1, 8, 64), (8192,)
PAGE_TOKENS, C, J, W = 256, 512, 128, 128
RECORD = KvRecord().nbytes
MAX_COPIES = 48


def copies(num_bytes: int) -> int:
    """Sets of buffers to go round: enough to exceed L2, within reason."""
    return max(1, min(MAX_COPIES, -(-COLD_BYTES // num_bytes)))


def case(op: str, shape: dict[str, Any], calls: list[Any], num_bytes: int) -> Case:
    """A case with a copy as its baseline."""
    baseline = copy_calls(num_bytes, copies(num_bytes))
    return Case(op, shape, calls, num_bytes, baseline="copy", baseline_calls=baseline)


def spans_of(num_tokens: int, is_decode: bool) -> list[Span]:
    """One token each that completes windows of 4 and 128, or one prompt."""
    return [(s, 127, 1) for s in range(num_tokens)] if is_decode else [(0, 0, num_tokens)]


def window_cases() -> Iterator[Case]:
    for T in DECODE:
        num_bytes = T * (2 * C + RECORD)
        made = [WindowCase.random(T, 128, C, W, seed=i) for i in range(min(8, copies(num_bytes)))]
        args = [m.fresh("cuda").append_args(spans_of(T, True)) for m in made]
        calls = [partial(ops.kv_window_append, **a) for a in args]
        yield case("kv_window_append", {"T": T, "C": C, "phase": "decode"}, calls, num_bytes)
    for T in PREFILL:
        # Of one long prompt only the last window is kept; many of 128 tokens keep all.
        num_bytes, spans = T * (2 * C + RECORD), [(s, 0, W) for s in range(T // W)]
        made = WindowCase.random(T // W, W, C, W)
        args = [made.fresh("cuda").append_args(spans) for _ in range(copies(num_bytes))]
        calls = [partial(ops.kv_window_append, **a) for a in args]
        yield case("kv_window_append", {"T": T, "C": C, "phase": "prefill"}, calls, num_bytes)


def insert_bytes(made: CompressorCase, T: int, is_decode: bool) -> int:
    """Score and value rows of the windows, read once, and the records."""
    ratio, dims = made.ratio, made.norm.shape[0]
    halves = made.kappa.shape[2] // dims
    entries = T if is_decode else T // ratio
    record = RECORD if made.keys is None else IndexRecord(dims, made.keys).nbytes
    return entries * (2 * 4 * halves * ratio * dims + record)


def compressor_cases() -> Iterator[Case]:
    kinds = (("csa", 4, C, None), ("hca", 128, C, None), ("fp8", 4, J, "fp8"),
             ("mxfp4", 4, J, "mxfp4"))  # fmt: skip
    for name, ratio, dims, keys in kinds:
        for T, is_decode in [(T, True) for T in DECODE] + [(T, False) for T in PREFILL]:
            slots, length = (T, 128) if is_decode else (1, T)
            made = compressor_case(
                ratio, dims, length, slots, page_tokens=PAGE_TOKENS, keys=keys, is_rotated=True
            )  # fmt: skip
            num_bytes = insert_bytes(made, T, is_decode)
            op = "compressor_insert" if keys is None else "index_key_insert"
            calls = []
            for _ in range(min(8, copies(num_bytes))):
                own = made.fresh("cuda")
                own.state.normal_()
                args = own.insert_args(spans_of(T, is_decode))
                calls.append(partial(getattr(ops, op), **args))
            shape = {"T": T, "kind": name, "phase": "decode" if is_decode else "prefill"}
            yield case(op, shape, calls, num_bytes)
            if is_decode:
                yield idle_case(made, op, name, T)
            if keys is None:
                yield append_case(made, name, T, is_decode)


def idle_case(made: CompressorCase, op: str, name: str, T: int) -> Case:
    """A step of T requests of which none completes a window: what most decode steps are."""
    own = made.fresh("cuda")
    args = own.insert_args([(s, 125, 1) for s in range(T)])
    shape = {"T": T, "kind": name, "phase": "idle"}
    return case(op, shape, [partial(getattr(ops, op), **args)], 2 * 8 * T)


def append_case(made: CompressorCase, name: str, T: int, is_decode: bool) -> Case:
    """The state rows of the same step: a prompt leaves its last rows alone."""
    written = T if is_decode else made.state.shape[2]
    num_bytes = written * made.kappa.shape[2] * 2 * 4 * 2
    spans = spans_of(T, is_decode)
    calls = [
        partial(ops.compressor_state_append, **made.fresh("cuda").append_args(spans))
        for _ in range(min(4, copies(num_bytes)))
    ]
    shape = {"T": T, "kind": name, "phase": "decode" if is_decode else "prefill"}
    return case("compressor_state_append", shape, calls, num_bytes)


def layer_cases() -> Iterator[Case]:
    """What a step writes for a CSA layer, in one launch and op after op."""
    for T, phase in [(T, p) for T in DECODE for p in ("decode", "idle")] + [(8192, "prefill")]:
        spans = spans_of(T, phase != "prefill")
        if phase == "idle":
            spans = [(s, 125, 1) for s in range(T)]
        slots, length = (1, T) if phase == "prefill" else (T, 128)
        window = WindowCase.random(slots, length, C, W)
        entries = compressor_case(4, C, length, slots, page_tokens=PAGE_TOKENS)
        keys = compressor_case(
            4, J, length, slots, page_tokens=PAGE_TOKENS, keys="fp8", is_rotated=True
        )
        rows = (W, 8) if phase == "prefill" else (T, T)
        num_bytes = {
            "entry_and_key_insert": 2 * 8 * T if phase == "idle" else sum(
                insert_bytes(x, T, phase == "decode") for x in (entries, keys)
            ),
            "cache_step_append": rows[0] * (2 * C + RECORD) + rows[1] * 2 * (C + J) * 2 * 4 * 2,
        }  # fmt: skip
        made: dict[str, list[tuple[Any, Any]]] = {op: [] for op in num_bytes}
        for _ in range(min(4, copies(num_bytes["cache_step_append"]))):
            ring, *pair = own = [x.fresh("cuda") for x in (window, entries, keys)]
            for x in pair:
                x.state.normal_()
            made["entry_and_key_insert"].append(
                (insert_both_args(*pair, spans), partial(in_turn, [
                    partial(ops.compressor_insert, **pair[0].insert_args(spans)),
                    partial(ops.index_key_insert, **pair[1].insert_args(spans)),
                ]))
            )  # fmt: skip
            made["cache_step_append"].append(
                (step_append_args(*own, spans), partial(in_turn, [
                    partial(ops.kv_window_append, **ring.append_args(spans)),
                    *(partial(ops.compressor_state_append, **x.append_args(spans)) for x in pair),
                ]))
            )  # fmt: skip
        for op, pairs in made.items():
            calls = [partial(getattr(ops, op), **args) for args, _ in pairs]
            yield Case(
                op, {"T": T, "kind": "csa", "phase": phase}, calls, num_bytes[op],
                baseline="chain", baseline_calls=[chain for _, chain in pairs],
            )  # fmt: skip


def in_turn(calls: Sequence[Callable[[], Any]]) -> None:
    """One call after the other."""
    for call in calls:
        call()


def gather_cases() -> Iterator[Case]:
    per_page = PAGE_TOKENS // 4
    for N in (512, 65536):
        num_pages = N // per_page + 1
        pages = torch.full((num_pages, KvRecord().page_bytes(per_page)), 0x41, dtype=torch.uint8)
        table = torch.arange(1, num_pages, dtype=torch.int32)[None]
        at = torch.zeros(N, dtype=torch.int64), torch.randperm(N)
        calls = []
        for _ in range(min(8, copies(N * RECORD))):
            tensors = [x.clone().cuda() for x in (pages, table, *at)]
            args = *tensors, per_page, C, 64, torch.bfloat16
            calls.append(partial(ops.gather_entries, *args))
        yield case("gather_entries", {"N": N, "C": C}, calls, N * (RECORD + 2 * C))


def cases() -> Iterator[Case]:
    """Every row of this file."""
    yield from window_cases()
    yield from compressor_cases()
    yield from layer_cases()
    yield from gather_cases()


if __name__ == "__main__":
    run(cases(), "Cache kernels at the shapes of V4-Flash")
