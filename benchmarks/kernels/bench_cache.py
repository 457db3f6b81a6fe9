"""Cache kernels. `python -m benchmarks.kernels.bench_cache [--json PATH] [--only OP]`

Decode is the worst case: every request completes a window in the step; idle is a decode step in
which none does. The baseline of insertions is torch.compile of their oracle, told which rows
complete a window, as looking for them reads back to the host; of other ops a device copy that moves
as many bytes; of fused ops their parts.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.core.kv_layout import IndexRecord, KvRecord
from dsv4.ops import cache as ops
from dsv4.reference.compressor import pool_windows
from dsv4.reference.kv_records import (
    index_record_pack_fp8,
    index_record_pack_mxfp4,
    kv_record_pack,
)
from dsv4.reference.norm import rms_norm
from dsv4.reference.quant import hadamard
from dsv4.reference.rope import apply_rope
from dsv4.testing.bench import COLD_BYTES, Case, CompiledOracle, Turns, copy_calls, run
from dsv4.testing.cases.cache import (
    CompressorCase,
    Span,
    WindowCase,
    compressor_case,
    insert_both_args,
    step_append_args,
)

DECODE, PREFILL = (64, 8, 1), (8192, 1024)
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


def chosen_insert(
    chosen: Tensor, kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor,
    sin: Tensor, pages: Tensor, page_table: Tensor, slot: Tensor, position: Tensor,
    first_row: Tensor, first_position: Tensor, ratio: int, entries_per_page: int, eps: float,
    dtype: torch.dtype, keys: str | None = None, is_rotated: bool = False,
) -> None:  # fmt: skip
    """compressor_insert and index_key_insert of the rows `chosen`, which complete a window."""
    rows, dims = state.shape[2], len(norm)
    slot, position = slot[chosen], position[chosen]
    start, first = first_position[chosen, None], first_row[chosen, None]
    at = position[:, None] + torch.arange(rows, device=kappa.device) - rows + 1
    is_new, step_row = (at >= start)[..., None], (first + at - start).clamp(0, len(kappa) - 1)
    ring, absent = state[slot[:, None], :, at % rows], (at < 0)[..., None]
    values = torch.where(is_new, kappa[step_row], ring[:, :, 0]).masked_fill(absent, 0)
    scores = torch.where(is_new, gamma[step_row], ring[:, :, 1]).masked_fill(absent, -torch.inf)
    if values.shape[2] != dims:  # of the window before, and of this one
        values, scores = (
            torch.cat((x[:, :ratio, :dims], x[:, ratio:, dims:]), dim=1) for x in (values, scores)
        )
    entry = position // ratio
    x = rms_norm(pool_windows(values, scores).to(dtype), norm, eps)
    x = apply_rope(x, cos[entry], sin[entry])
    x = hadamard(x) if is_rotated else x
    pack = index_record_pack_fp8 if keys == "fp8" else index_record_pack_mxfp4
    record = pack(x) if keys else kv_record_pack(x, 2 * cos.shape[1])
    layout = IndexRecord(dims, keys) if keys else KvRecord(dims, 2 * cos.shape[1])
    size = layout.value_bytes if isinstance(layout, IndexRecord) else layout.data_bytes
    page = page_table[slot, entry // entries_per_page].long()
    row, end = entry % entries_per_page, entries_per_page * layout.nbytes
    parts = pages[:, : entries_per_page * size], pages[:, entries_per_page * size : end]
    for part, written in zip(parts, (record[:, :size], record[:, size:]), strict=True):
        part.unflatten(1, (entries_per_page, -1))[page, row] = written


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
        baselines = CompiledOracle(chosen_insert), CompiledOracle(chosen_insert)
        for T, is_decode in [(T, True) for T in DECODE] + [(T, False) for T in PREFILL]:
            slots, length = (T, 128) if is_decode else (1, T)
            made = compressor_case(
                ratio, dims, length, slots, page_tokens=PAGE_TOKENS, keys=keys, is_rotated=True
            )  # fmt: skip
            num_bytes = insert_bytes(made, T, is_decode)
            op = "compressor_insert" if keys is None else "index_key_insert"
            sets = []
            for _ in range(min(8, copies(num_bytes))):
                own = made.fresh("cuda")
                own.state.normal_()
                sets.append(own.insert_args(spans_of(T, is_decode)))
            calls = [partial(getattr(ops, op), **args) for args in sets]
            shape = {"T": T, "kind": name, "phase": "decode" if is_decode else "prefill"}
            last = ((sets[0]["position"] + 1) % ratio == 0).nonzero().squeeze(1)
            base = baselines[is_decode].calls([{"chosen": last} | args for args in sets], T)
            yield Case(
                op, shape, calls, num_bytes, baseline=CompiledOracle.NAME, baseline_calls=base
            )
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
    steps = [(T, phase) for T in DECODE for phase in ("decode", "idle")]
    for T, phase in steps + [(T, "prefill") for T in PREFILL]:
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


def cases() -> Turns:
    """Every row of this file."""
    yield window_cases()
    yield compressor_cases()
    yield layer_cases()
    yield gather_cases()


if __name__ == "__main__":
    run(cases(), "Cache kernels at the shapes of V4-Flash")
