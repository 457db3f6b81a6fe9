"""dsv4.kernels.cache against dsv4.reference.cache_writes, byte for byte where FP32 is exact."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.core.config import LayerKind
from dsv4.core.kv_layout import IndexRecord, KvRecord
from dsv4.ops import cache as ops
from dsv4.reference import cache_writes as oracle
from dsv4.reference.compressor import CompressorState, compress
from dsv4.reference.kv_records import (
    index_page_pack,
    kv_page_pack,
    kv_record_pack,
    kv_record_unpack,
)
from dsv4.reference.norm import rms_norm
from dsv4.reference.quant import hadamard
from dsv4.reference.rope import apply_rope
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.cache import (
    EPS,
    CompressorCase,
    Span,
    WindowCase,
    cache_calls,
    chunks,
    compressor_case,
    insert_both_args,
    step_append_args,
)
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

BF16, FP32 = torch.bfloat16, torch.float32
# Two requests side by side: whole prompts, pieces across windows, single tokens, padding.
MIXED: list[list[Span]] = [
    [(0, 0, 13), (2, 0, 1)], [(2, 1, 6), (0, 13, 1)], [(0, 14, 1), (2, 7, 1)],
    [(0, 15, 19), (2, 8, 27)],
]  # fmt: skip


def run_window(
    impl: Any, case: WindowCase, steps: Sequence[Sequence[Span]], pad: int = 0
) -> Tensor:
    for spans in steps:
        impl.kv_window_append(**case.append_args(spans, pad))
    return case.window


def run(
    impl: Any, case: CompressorCase, steps: Sequence[Sequence[Span]], pad: int = 0
) -> tuple[Tensor, Tensor]:
    """Insert, then append, step after step -> pages, state."""
    insert = impl.compressor_insert if case.keys is None else impl.index_key_insert
    for spans in steps:
        insert(**case.insert_args(spans, pad))
        impl.compressor_state_append(**case.append_args(spans, pad))
    return case.pages, case.state


def assert_same(case: CompressorCase, steps: Sequence[Sequence[Span]], pad: int = 0) -> None:
    got, want = run(ops, case.fresh(DEVICE), steps, pad), run(oracle, case.fresh(), steps, pad)
    assert_bits_equal("state", got[1], want[1])
    assert_bits_equal("pages", got[0], want[0])


# Window ring


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("head_dim", [512, 128, 192])
def test_window_equals_the_oracle(head_dim: int, dtype: torch.dtype) -> None:
    case = WindowCase.random(3, 40, head_dim, rows=16, dtype=dtype)
    got, want = (
        run_window(i, case.fresh(d), MIXED, 2) for i, d in ((ops, DEVICE), (oracle, "cpu"))
    )
    assert_bits_equal("window", got, want)
    assert (got[1] == 0xFF).all()


def test_window_is_a_page_of_the_last_tokens() -> None:
    case = WindowCase.random(1, 16, 512, rows=16)
    got = run_window(ops, case.fresh(DEVICE), [[(0, 0, 16)]])
    want = kv_page_pack(case.kv[0])
    used = 16 * KvRecord().nbytes
    assert_bits_equal("ring", got[0, :used], want[:used])
    assert (got[0, used:] == 0xFF).all()  # the padding of a page is not written


@pytest.mark.parametrize("sizes", [(1,), (3,), (16,), (17, 1), (40,)])
def test_window_does_not_depend_on_chunking(sizes: tuple[int, ...]) -> None:
    case = WindowCase.random(1, 40, 128, rows=16)
    got = run_window(ops, case.fresh(DEVICE), chunks(40, sizes))
    record = KvRecord(128)
    want = torch.full_like(case.window, 0xFF)[0]
    for p in range(24, 40):
        row, packed = p % 16, kv_record_pack(case.kv[0, p : p + 1])[0]
        want[row * record.data_bytes :][: record.data_bytes] = packed[: record.data_bytes]
        want[16 * record.data_bytes + row * 8 :][:8] = packed[record.data_bytes :]
    assert_bits_equal("ring", got[0].cpu(), want)


@pytest.mark.parametrize("op", ["kv_window_append", "compressor_state_append"])
def test_a_ring_row_has_one_writer(op: str) -> None:
    """A chunk of twice the ring, its rows in reverse: the order of writes decides nothing."""
    if op == "kv_window_append":
        case, name = WindowCase.random(1, 32, 128, rows=16), "window"
    else:
        case, name = compressor_case(4, 128, 16), "state"
    results = []
    for is_reversed in (False, True):
        own = case.fresh(DEVICE)
        args = own.append_args([(0, 0, 32 if name == "window" else 16)])
        for k in set(args) & {"kv", "kappa", "gamma", "slot", "position", "end_position"}:
            args[k] = args[k].flip(0) if is_reversed else args[k]
        getattr(ops, op)(**args)
        results.append(args[name])
    assert_bits_equal(name, *results)


@pytest.mark.parametrize("op", ["kv_window_append", "compressor_state_append"])
def test_rejected_rows_are_not_appended(op: str) -> None:
    """Rows from end_position on: the ring keeps what they would have overwritten."""
    if op == "kv_window_append":
        case, name = WindowCase.random(3, 60, 128, rows=16), "window"
    else:
        case, name = compressor_case(4, 128, 60, num_slots=3), "state"
    spans, accepted = [(0, 30, 9), (2, 17, 6), (1, 20, 20)], {0: 33, 2: 17, 1: 39}
    ends = []
    for impl, device in ((ops, DEVICE), (oracle, "cpu")):
        own = case.fresh(device)
        getattr(impl, op)(**own.append_args([(0, 14, 16), (2, 1, 16), (1, 4, 16)]))
        args = own.append_args(spans, 2)
        for slot, end in accepted.items():
            args["end_position"][args["slot"] == slot] = end
        getattr(impl, op)(**args)
        ends.append(args[name])
    assert_bits_equal(name, *ends)
    want = case.fresh()
    getattr(oracle, op)(**want.append_args([(0, 14, 16), (2, 1, 16), (1, 4, 16)]))
    getattr(oracle, op)(**want.append_args([(0, 30, 3), (1, 20, 19)]))
    assert_bits_equal(name, ends[0].cpu(), getattr(want, name))


def test_window_of_infinite_values_is_marked_nan() -> None:
    case = WindowCase.random(1, 2, 128, rows=16)
    case.kv[0, 0, 5], case.kv[0, 1, 6] = float("inf"), float("nan")
    got = run_window(ops, case.fresh(DEVICE), [[(0, 0, 2)]])
    want = run_window(oracle, case.fresh(), [[(0, 0, 2)]])
    assert_bits_equal("window", got, want)


# Compressed entries


@pytest.mark.parametrize("ratio", [4, 128])
def test_oracle_is_the_reference_pipeline(ratio: int) -> None:
    """compress, rms_norm, apply_rope and a page packer give what the oracle leaves in the pages."""
    kind = LayerKind.CSA if ratio == 4 else LayerKind.HCA
    for dtype in (BF16, FP32):
        case = compressor_case(ratio, 128, 256, page_tokens=256, dtype=dtype, seed=3)
        pages, _ = run(oracle, case.fresh(), chunks(256, (37, 1, 100)))
        empty = CompressorState.empty(case.kappa.shape[2], case.kappa)
        pooled, _ = compress(empty, case.kappa[0], case.gamma[0], kind)
        entries = apply_rope(rms_norm(pooled.to(dtype), case.norm, EPS), case.cos, case.sin)
        used = case.entries_per_page * KvRecord(128).nbytes
        page = int(case.page_table[0, 0])
        assert_bits_equal("page", pages[page, :used], kv_page_pack(entries)[:used])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("dims", [512, 128, 192])
def test_overlapping_entries_equal_the_oracle(dims: int, dtype: torch.dtype) -> None:
    case = compressor_case(4, dims, 40, num_slots=3, dtype=dtype, is_exact=True)
    assert_same(case, MIXED, pad=2)


@pytest.mark.parametrize("page_tokens", [128, 256])
def test_entries_equal_the_oracle_at_both_page_sizes(page_tokens: int) -> None:
    steps = [[(1, 0, 130)], [(1, 130, 128), (0, 0, 5)]]
    csa = compressor_case(4, 128, 260, num_slots=2, page_tokens=page_tokens, is_exact=True)
    assert_same(csa, steps)
    hca = compressor_case(128, 128, 260, num_slots=2, page_tokens=page_tokens, is_exact=True)
    assert_same(hca, steps)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_long_window_entries_equal_the_oracle(dtype: torch.dtype) -> None:
    case = compressor_case(128, 512, 300, num_slots=2, dtype=dtype, is_exact=True)
    steps = [[(1, 0, 127)], [(1, 127, 1), (0, 0, 100)], [(0, 100, 200), (1, 128, 40)]]
    assert_same(case, steps, pad=1)


def test_channels_that_do_not_fill_the_last_program() -> None:
    case = compressor_case(128, 192, 140, is_exact=True)
    assert_same(case, [[(0, 0, 100)], [(0, 100, 40)]], pad=1)


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_random_entries_are_as_exact_as_the_oracle(ratio: int, dtype: torch.dtype) -> None:
    case = compressor_case(ratio, 512, 256, page_tokens=256, dtype=dtype, seed=ratio)
    steps = [[(0, 0, 256)]]
    got, want = (run(i, case.fresh(d), steps)[0].cpu() for i, d in ((ops, DEVICE), (oracle, "cpu")))
    page, n = int(case.page_table[0, 0]), case.entries_per_page
    at = torch.full((n,), page), torch.arange(n), n, 576, 8
    records = [oracle.gather_records(pages, *at) for pages in (got, want)]
    assert_at_most_one_code_apart(*records)
    args = case.insert_args(steps[0])
    names = ("kappa", "gamma", "state", "norm", "cos", "sin")
    wide = {k: args[k].double() for k in names}
    rows = {k: args[k] for k in ("slot", "position", "first_row", "first_position", "ratio")}
    _, exact = oracle.compressed_entries(**wide, **rows, eps=EPS, dtype=torch.float64)
    values = [kv_record_unpack(r, FP32) for r in records]
    assert_as_exact_as("entries", *values, exact)


def assert_at_most_one_code_apart(got: Tensor, want: Tensor) -> None:
    """Records of one entry: equal scales, FP8 and BF16 codes that are neighbours, few of them."""
    assert_bits_equal("scales", got[:, 576:], want[:, 576:])
    codes = [_ordered(r[:, :448].to(torch.int32), 0x80) for r in (got, want)]
    words = [r[:, 448:576].contiguous().view(torch.int16) for r in (got, want)]
    rope = [_ordered(w.to(torch.int32) & 0xFFFF, 0x8000) for w in words]
    for pair in (codes, rope):
        apart = (pair[0] - pair[1]).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.02


def _ordered(code: Tensor, sign: int) -> Tensor:
    """Sign and magnitude as one integer that grows with the value."""
    magnitude = code & (sign - 1)
    return torch.where(code >= sign, -magnitude, magnitude)


@pytest.mark.parametrize(
    ("ratio", "length", "sizes"),
    [
        (4, 37, (1,)), (4, 37, (3, 5)), (4, 37, (4,)), (4, 37, (5, 1, 1)), (4, 37, (8, 9)),
        (128, 260, (127, 1, 1, 126)), (128, 260, (129,)), (128, 260, (128, 64)), (128, 133, (1,)),
    ],
)  # fmt: skip
def test_entries_do_not_depend_on_chunking(ratio: int, length: int, sizes: tuple[int, ...]) -> None:
    case = compressor_case(ratio, 128, length, seed=length)
    whole = run(ops, case.fresh(DEVICE), [[(0, 0, length)]])
    cut = run(ops, case.fresh(DEVICE), chunks(length, sizes))
    assert_bits_equal("pages", cut[0], whole[0])
    assert_bits_equal("state", cut[1], whole[1])


@pytest.mark.parametrize("ratio", [4, 128])
def test_entries_do_not_depend_on_the_batch(ratio: int) -> None:
    """A request alone, and the same in another slot and other pages among strangers."""
    case = compressor_case(ratio, 128, 140, num_slots=4, seed=1)
    alone = run(ops, case.fresh(DEVICE), [[(1, 0, 130)], [(1, 130, 2)]])
    kappa, gamma = case.kappa[[3, 2, 0, 1]], case.gamma[[3, 2, 0, 1]]
    table = case.page_table[[2, 0, 1, 3]]
    moved = CompressorCase(**vars(case) | {"kappa": kappa, "gamma": gamma, "page_table": table})
    steps = [[(0, 0, 9), (3, 0, 130), (2, 0, 7)], [(2, 7, 1), (0, 9, 33), (3, 130, 2)]]
    among = run(ops, moved.fresh(DEVICE), steps, pad=3)
    assert_bits_equal("state", among[1][3], alone[1][1])
    assert_bits_equal("pages", among[0][table[3].long()], alone[0][case.page_table[1].long()])


def test_entries_on_the_null_page_or_past_the_table_are_not_written() -> None:
    case = compressor_case(4, 128, 300, is_exact=True)
    case.page_table[0, 0] = 0  # page 1 of the request is real, the third does not exist
    case = CompressorCase(**vars(case) | {"page_table": case.page_table[:, :2].contiguous()})
    pages, _ = run(ops, case.fresh(DEVICE), [[(0, 0, 300)]])
    written = (pages != 0xFF).any(dim=1).nonzero().flatten().tolist()
    assert written == [int(case.page_table[0, 1])]
    assert_same(case, [[(0, 0, 300)]])


# Indexer keys


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("is_rotated", [False, True])
@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
def test_index_keys_equal_the_oracle(keys: Any, is_rotated: bool, dtype: torch.dtype) -> None:
    case = compressor_case(
        4, 128, 40, num_slots=3, dtype=dtype, is_exact=True, keys=keys, is_rotated=is_rotated
    )
    assert_same(case, MIXED, pad=1)


@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
def test_index_oracle_is_the_reference_pipeline(keys: Any) -> None:
    case = compressor_case(4, 128, 128, keys=keys, is_rotated=True, seed=5)
    pages, _ = run(oracle, case.fresh(), chunks(128, (31,)))
    empty = CompressorState.empty(256, case.kappa)
    pooled, _ = compress(empty, case.kappa[0], case.gamma[0], LayerKind.CSA)
    entries = apply_rope(rms_norm(pooled.to(BF16), case.norm, EPS), case.cos, case.sin)
    want = index_page_pack(hadamard(entries), keys)
    assert_bits_equal("page", pages[int(case.page_table[0, 0])], want)


@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
def test_random_index_keys_are_one_code_from_the_oracle(keys: Any) -> None:
    case = compressor_case(4, 128, 256, page_tokens=256, keys=keys, is_rotated=True, seed=7)
    steps = [[(0, 0, 256)]]
    got, want = (run(i, case.fresh(d), steps)[0].cpu() for i, d in ((ops, DEVICE), (oracle, "cpu")))
    page, record = int(case.page_table[0, 0]), IndexRecord(128, keys)
    split = record.scale_offset(64)
    assert_bits_equal("scales", got[page, split:], want[page, split:])
    values = [x[page, :split].to(torch.int32) for x in (got, want)]
    if keys == "mxfp4":
        values = [torch.stack((v & 0xF, v >> 4)) for v in values]
    sign = 0x80 if keys == "fp8" else 8
    apart = (_ordered(values[0], sign) - _ordered(values[1], sign)).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.02


@pytest.mark.parametrize("sizes", [(1,), (3, 5), (7, 1)])
def test_index_keys_do_not_depend_on_chunking(sizes: tuple[int, ...]) -> None:
    case = compressor_case(4, 128, 37, keys="mxfp4", is_rotated=True, seed=2)
    whole = run(ops, case.fresh(DEVICE), [[(0, 0, 37)]])
    cut = run(ops, case.fresh(DEVICE), chunks(37, sizes))
    assert_bits_equal("pages", cut[0], whole[0])
    assert_bits_equal("state", cut[1], whole[1])


@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
def test_index_keys_on_the_null_page_or_past_the_table_are_not_written(keys: Any) -> None:
    case = compressor_case(4, 128, 300, is_exact=True, keys=keys, is_rotated=True)
    case.page_table[0, 0] = 0  # page 1 of the request is real, the third does not exist
    case = CompressorCase(**vars(case) | {"page_table": case.page_table[:, :2].contiguous()})
    real = int(case.page_table[0, 1])
    for impl, device in ((ops, DEVICE), (oracle, "cpu")):
        pages, _ = run(impl, case.fresh(device), [[(0, 0, 300)]])
        assert (pages != 0xFF).any(dim=1).nonzero().flatten().tolist() == [real]
    assert_same(case, [[(0, 0, 300)]])


# Both at once


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize(
    ("dims", "index_dims", "ratio", "form"),
    [
        (192, 128, 4, {"keys": "mxfp4", "is_rotated": True}),
        (512, 128, 4, {"keys": "fp8", "is_rotated": True}),
        (128, 64, 8, {"keys": "fp8", "dtype": FP32}),
        (512, 128, 16, {"keys": "mxfp4", "overlap": False}),
    ],
)
def test_inserts_in_one_launch_equal_the_chain(
    dims: int, index_dims: int, ratio: int, form: Any, is_exact: bool
) -> None:
    """In short and in long steps, from windows in one part and in several."""
    both = {"overlap": True, "page_tokens": 32, "is_exact": is_exact}
    plain = {k: v for k, v in form.items() if k in ("dtype", "overlap")}
    entries = compressor_case(ratio, dims, 40, 3, **both | plain, seed=1)
    index = compressor_case(ratio, index_dims, 40, 3, **both | form, seed=1)

    def run_layer(impl: Any, device: str, is_chain: bool) -> list[Tensor]:
        own, its = entries.fresh(device), index.fresh(device)
        for spans in MIXED:
            if is_chain:
                impl.compressor_insert(**own.insert_args(spans, 2))
                impl.index_key_insert(**its.insert_args(spans, 2))
            else:
                impl.entry_and_key_insert(**insert_both_args(own, its, spans, 2))
            for case in (own, its):
                impl.compressor_state_append(**case.append_args(spans, 2))
        return [own.pages, its.pages]

    chain = run_layer(ops, DEVICE, True)
    wanted = [run_layer(ops, DEVICE, False)]
    if is_exact:
        wanted.append(run_layer(oracle, "cpu", False))
    for want in wanted:
        for name, x, y in zip(("entries", "keys"), want, chain, strict=True):
            assert_bits_equal(name, x.cpu(), y.cpu())
    assert all(bool((x != 0xFF).any()) for x in chain)


def test_only_windows_of_one_kind_go_together() -> None:
    entries = compressor_case(4, 128, 8, overlap=True).fresh(DEVICE)
    index = compressor_case(4, 64, 8, overlap=False, keys="fp8").fresh(DEVICE)
    with pytest.raises(ValueError, match="index_kappa: expected width 128, .* got 64"):
        ops.entry_and_key_insert(**insert_both_args(entries, index, [(0, 0, 8)]))


# State, reads


@pytest.mark.parametrize("name", ["swa", "hca", "csa", "index"])
def test_appends_in_one_launch_equal_the_chain(name: str) -> None:
    """Every ring of a layer, byte for byte what the ops leave one after the other."""
    window = WindowCase.random(3, 40, 192, rows=16)
    hca = compressor_case(16, 192, 40, num_slots=3, seed=1)
    csa = compressor_case(4, 192, 40, num_slots=3, seed=2)
    keys = compressor_case(8, 128, 40, num_slots=3, overlap=True, keys="fp8", seed=3)
    cases = {"swa": (None, None), "hca": (hca, None), "csa": (csa, keys), "index": (None, keys)}

    def run_layer(impl: Any, device: str, is_chain: bool) -> list[Tensor]:
        own = window.fresh(device)
        states = [None if case is None else case.fresh(device) for case in cases[name]]
        for spans in MIXED:
            if not is_chain:
                impl.cache_step_append(**step_append_args(own, *states, spans, 2))
                continue
            impl.kv_window_append(**own.append_args(spans, 2))
            for case in filter(None, states):
                impl.compressor_state_append(**case.append_args(spans, 2))
        return [own.window, *(case.state for case in states if case is not None)]

    chain = run_layer(ops, DEVICE, True)
    for want in (run_layer(oracle, "cpu", False), run_layer(ops, DEVICE, False)):
        for x, y in zip(want, chain, strict=True):
            assert_bits_equal("ring", x.cpu(), y.cpu())


@pytest.mark.parametrize("missing", ["kappa", "index_state"])
def test_half_a_state_is_refused(missing: str) -> None:
    args = op_calls(4)["cache_step_append/csa"] | {missing: None}
    with pytest.raises(ValueError, match=f"{missing}: expected all of .* or none, got"):
        ops.cache_step_append(**args)


def test_a_new_request_reads_nothing_of_the_slot_before_it() -> None:
    """The state stays as an old request left it; no entry of the next one depends on it."""
    case = compressor_case(4, 128, 20, is_exact=True)
    clean, used = case.fresh(DEVICE), case.fresh(DEVICE)
    used.state.fill_(7.0)
    steps = chunks(20, (1, 6))
    assert_bits_equal("pages", run(ops, used, steps)[0], run(ops, clean, steps)[0])


def test_cache_reset() -> None:
    state = torch.full((5, 2, 8, 24), 3.0, device=DEVICE)
    ops.cache_reset(state, torch.tensor([3, -1, 0], device=DEVICE))
    want = torch.full((5, 2, 8, 24), 3.0)
    oracle.cache_reset(want, torch.tensor([3, -1, 0]))
    assert_bits_equal("state", state, want)
    assert (state[3, 0] == 0).all()
    assert (state[0, 1] == -torch.inf).all()
    assert (state[[1, 2, 4]] == 3).all()


def all_bytes(*shape: int) -> Tensor:
    """Bytes of every value except the FP8 and E8M0 patterns of NaN, in no order."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    return torch.where((x & 0x7F) == 0x7F, 5, x)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("head_dim", [512, 192])
def test_gather_window(head_dim: int, dtype: torch.dtype) -> None:
    window = all_bytes(4, KvRecord(head_dim).page_bytes(16))
    at = torch.tensor([3, 0, -1, 2, 2]), torch.tensor([0, 31, 5, 1000, -1])
    rest = 16, head_dim, 64, dtype
    want = oracle.gather_window(window, *at, *rest)
    got = ops.gather_window(window.to(DEVICE), *(x.to(DEVICE) for x in at), *rest)
    assert_bits_equal("rows", got, want)
    assert (got[[2, 4]] == 0).all()
    assert (got[[0, 1, 3]] != 0).any(dim=1).all()


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("store", ["entries", "fp8", "mxfp4"])
def test_gather_from_pages(store: Any, dtype: torch.dtype) -> None:
    is_key = store != "entries"
    record = IndexRecord(128, store) if is_key else KvRecord()
    pages = all_bytes(5, record.page_bytes(32))
    if store == "fp8":  # scales are powers of two there
        scales = pages[:, 32 * 128 :].view(torch.float32)
        scales.copy_(2.0 ** torch.randint(-22, 20, scales.shape))
    table = torch.tensor([[4, 0], [2, 1]], dtype=torch.int32)
    at = torch.tensor([0, 1, 1, -1, 0, 0, 1]), torch.tensor([31, 0, 33, 5, 40, -1, 64])
    rest = (32, 128, store, dtype) if is_key else (32, 512, 64, dtype)
    name = "gather_index_keys" if is_key else "gather_entries"
    want = getattr(oracle, name)(pages, table, *at, *rest)
    args = [x.to(DEVICE) for x in (pages, table, *at)]
    got = getattr(ops, name)(*args, *rest)
    assert_bits_equal("values", got, want)
    assert (got[3:] == 0).all()  # padding, the null page, no entry, past the table
    assert (got[:3] != 0).any(dim=1).all()


def test_gather_records() -> None:
    store = all_bytes(3, KvRecord().page_bytes(4))
    page, row = torch.tensor([2, 0, -1, 1]), torch.tensor([3, 0, 1, 2])
    args = store, page, row
    got = ops.gather_records(*(x.to(DEVICE) for x in args), 4, 576, 8)
    assert_bits_equal("records", got, oracle.gather_records(*args, 4, 576, 8))
    assert_bits_equal("value", got[0, :576], store[2, 3 * 576 : 4 * 576])
    assert_bits_equal("scale", got[0, 576:], store[2, 4 * 576 + 24 : 4 * 576 + 32])
    assert (got[2] == 0).all()


def test_what_was_written_is_what_is_read() -> None:
    case = compressor_case(4, 512, 40, num_slots=2, is_exact=True)
    pages, _ = run(ops, case.fresh(DEVICE), [[(1, 0, 40)]])
    slot, entry = torch.ones(10, dtype=torch.int64), torch.arange(10)
    at = (x.to(DEVICE) for x in (case.page_table, slot, entry))
    got = ops.gather_entries(pages, *at, 32, 512, 64, FP32)
    chosen, entries = oracle.compressed_entries(
        **{k: v for k, v in case.insert_args([(1, 0, 40)]).items() if k not in NOT_POOLING}
    )
    assert len(chosen) == 10
    want = kv_record_unpack(kv_record_pack(entries), FP32)
    assert_bits_equal("entries", got, want)


NOT_POOLING = ("pages", "page_table", "entries_per_page", "keys", "is_rotated")


# Every op: nothing to do, the registered op, a bad argument


def op_calls(num_tokens: int) -> dict[str, dict[str, Any]]:
    return cache_calls(num_tokens, device=DEVICE)


def op_named(name: str) -> Any:
    return getattr(ops, name.partition("/")[0])


OPS = sorted(op_calls(0))


@pytest.mark.parametrize("name", OPS)
def test_nothing_to_do_changes_nothing(name: str) -> None:
    args = op_calls(0)[name]
    before = {k: v.clone() for k, v in args.items() if isinstance(v, Tensor)}
    out = op_named(name)(**args)
    assert out is None or out.shape[0] == 0
    for k, v in before.items():
        assert_bits_equal(k, args[k], v)


@pytest.mark.parametrize("name", OPS)
def test_op_contract(name: str) -> None:
    torch.library.opcheck(op_named(name).op, (), op_calls(4)[name])


BAD = {
    "kv_window_append": ("window", lambda x: x[:, 1:].contiguous()),
    "compressor_insert": ("page_table", lambda x: x.long()),
    "index_key_insert": ("norm", lambda x: x[:127]),
    "compressor_state_append": ("state", lambda x: x.double()),
    "entry_and_key_insert": ("index_norm", lambda x: x[:127]),
    "cache_step_append": ("end_position", lambda x: x.int()),
    "cache_reset": ("slot", lambda x: x.int()),
    "gather_window": ("rows", lambda x: 0),
    "gather_entries": ("dtype", lambda x: torch.float16),
    "gather_index_keys": ("keys", lambda x: "int4"),
    "gather_records": ("num_rows", lambda x: -1),
}


@pytest.mark.parametrize("name", OPS)
def test_a_bad_argument_is_named(name: str) -> None:
    args = op_calls(4)[name]
    argument, spoil = BAD[name.partition("/")[0]]
    args[argument] = spoil(args[argument])
    with pytest.raises(ValueError, match=argument) as error:
        op_named(name)(**args)
    assert "expected" in str(error.value)
    assert "got" in str(error.value)
