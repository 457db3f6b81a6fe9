"""dsv4.kernels.indexer against dsv4.reference.paged_indexer: the same entries, up to FP32 ties."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4.kernels.indexer import indexer_scores_topk as kernel
from dsv4.kernels.indexer import topk_select as select_kernel
from dsv4.ops import indexer as ops
from dsv4.ops.norm import inverse_rope
from dsv4.reference import fused
from dsv4.reference import paged_indexer as oracle
from dsv4.reference.cache_writes import gather_index_keys
from dsv4.reference.indexer import indexer_scores
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.indexer import RATIO, IndexerCase, indexer_case, select_scores
from dsv4.testing.numeric import assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
FUZZ_EXAMPLES = int(os.environ.get("DSV4_FUZZ_EXAMPLES", "200"))
FUZZ_SHARDS = 1 if DEVICE == "cpu" else 28  # of choices: nearly every one compiles a kernel
FUZZ = settings(
    max_examples=FUZZ_EXAMPLES // 2, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
INF, NAN = float("inf"), float("nan")


def choose(case: IndexerCase) -> Tensor:
    return ops.indexer_scores_topk(**case.to(DEVICE).args()).cpu()


def check_choice(case: IndexerCase, got: Tensor) -> int:
    """Require the entries of FP64 scores, but for scores that FP32 cannot tell apart.

    -> how many rows differ from FP64 in such a tie
    """
    args = case.to("cpu").args()
    capacity = case.page_table.shape[1] * case.entries_per_page
    visible = oracle.paged_visible(args["slot"], args["position"], RATIO, capacity)
    query = oracle.round_query(args["q"], case.keys, case.is_rotated, case.is_rounded)
    num_tied = 0
    for t, row in enumerate(got.tolist()):
        n = int(visible[t])
        count = min(n, case.topk)
        assert row[count:] == [-1] * (case.topk - count), f"row {t}: not padded with -1"
        ids = row[:count]
        assert ids == sorted(set(ids)), f"row {t}: not ascending"
        assert not ids or (ids[0] >= 0 and ids[-1] < n), f"row {t}: an entry that is not visible"
        if n <= case.topk:
            continue
        entry = torch.arange(n)
        at = args["slot"][t].expand(n), entry, case.entries_per_page, 128, case.keys
        keys = gather_index_keys(args["pages"], args["page_table"], *at, torch.float32)
        q, u, v = query[t : t + 1], args["head_weights"][t : t + 1], visible[t : t + 1]
        same = indexer_scores(q, keys, u, v)
        exact = indexer_scores(q.double(), keys.double(), u.double(), v)
        limit = 4 * (same.double() - exact).abs().max() + 2e-7 * exact.abs().max()
        want = oracle.topk_select(exact, v, case.topk)[0, :count].tolist()
        extra, missing = sorted(set(ids) - set(want)), sorted(set(want) - set(ids))
        if extra:
            gap = exact[0, missing].max() - exact[0, extra].min()
            assert gap <= limit, f"row {t}: {extra} in place of {missing}, {gap:.2e} apart"
            num_tied += 1
    return num_tied


# topk_select


@pytest.mark.parametrize(
    ("S", "block"),
    [(0, 64), (1, 64), (16, 16), (17, 16), (47, 16), (63, 64), (64, 64), (65, 64), (200, 64),
     (200, 8192)],
)  # fmt: skip
def test_topk_select_equals_the_oracle(S: int, block: int, monkeypatch: Any) -> None:
    """Rows of one block, of several, and around their borders."""
    monkeypatch.setitem(select_kernel.CONFIG, "BLOCK", block)
    lengths = torch.tensor([S, 0, S // 2, min(S, 9), min(S, 8), max(S - 1, 0)])
    for levels in (0, 3):
        scores = select_scores(len(lengths), S, levels, seed=S)
        got = ops.topk_select(scores.to(DEVICE), lengths.to(DEVICE), 8)
        assert_bits_equal("places", got.cpu(), oracle.topk_select(scores, lengths, 8))


@pytest.mark.parametrize(
    "row",
    [
        [0.0] * 40, [-INF] * 40, [INF] * 40, [NAN] * 40, [-0.0, 0.0] * 20, [NAN, 1.0] * 20,
        [INF, -INF, NAN, 0.0] * 10, [1e-45, 0.0, -1e-45, 2e-45] * 10, [3e38, -3e38] * 20,
        [1.0 + i * 2**-23 for i in range(40)], [-(2.0 ** (i - 20)) for i in range(40)],
    ],
)  # fmt: skip
def test_topk_select_of_odd_numbers(row: list[float]) -> None:
    scores = torch.tensor([row, row[::-1]])
    for topk in (1, 7, 20, 39):
        lengths = torch.tensor([40, 33])
        got = ops.topk_select(scores.to(DEVICE), lengths.to(DEVICE), topk)
        assert_bits_equal("places", got.cpu(), oracle.topk_select(scores, lengths, topk))


@FUZZ
@given(st.data())
def test_topk_select_fuzzed(data: st.DataObject) -> None:
    T, S = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 100))
    topk, levels = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([0, 1, 4]))
    lengths = torch.tensor([data.draw(st.integers(0, S)) for _ in range(T)], dtype=torch.int64)
    scores = select_scores(T, S, levels, seed=data.draw(st.integers(0, 999)))
    odd = data.draw(st.lists(st.tuples(st.integers(), st.sampled_from([NAN, INF, -INF, -0.0]))))
    for at, value in odd:
        if scores.numel():
            scores.view(-1)[at % scores.numel()] = value
    # What lies after a row's length is not to be read.
    read = scores.clone()
    read[torch.arange(S)[None, :] >= lengths[:, None]] = data.draw(st.sampled_from([NAN, INF]))
    old = select_kernel.CONFIG["BLOCK"]
    select_kernel.CONFIG["BLOCK"] = data.draw(st.sampled_from([64, 8192]))
    try:
        got = ops.topk_select(read.to(DEVICE), lengths.to(DEVICE), topk)
    finally:
        select_kernel.CONFIG["BLOCK"] = old
    assert_bits_equal("places", got.cpu(), oracle.topk_select(scores, lengths, topk))


# indexer_scores_topk


@pytest.mark.parametrize("is_rounded", [True, False])
@pytest.mark.parametrize("is_rotated", [True, False])
@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
def test_choice_equals_the_oracle(keys: Any, is_rotated: bool, is_rounded: bool) -> None:
    """Several requests, several queries each; fewer entries than K, exactly K, one more."""
    spans = [(400, 2), (30, 1), (127, 1), (131, 1), (0, 1), (260, 2)]
    case = indexer_case(
        spans, 32, keys, padding=2, is_rotated=is_rotated, is_rounded=is_rounded
    )  # fmt: skip
    got = choose(case)
    assert check_choice(case, got) <= 1
    same = (got == oracle.indexer_scores_topk(**case.args())).all(dim=1)
    assert int((~same).sum()) <= 1


@pytest.mark.parametrize("num_heads", [1, 17, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_counts_and_query_dtypes(num_heads: int, dtype: torch.dtype) -> None:
    case = indexer_case([(300, 1)], 16, num_heads=num_heads, dtype=dtype)
    check_choice(case, choose(case))


@pytest.mark.parametrize("rope_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
def test_rope_here_equals_rope_before(keys: Any, dtype: torch.dtype, rope_dim: int) -> None:
    """Bit for bit: queries and weights as the scores see them, and the entries."""
    case = indexer_case(
        [(400, 2), (30, 1), (1000, 1)], 16, keys, num_heads=6, padding=2, dtype=dtype,
        rope_dim=rope_dim,
    )  # fmt: skip
    case.q[:, :, ::5] *= 0.0  # zeros of both signs
    here = case.to(DEVICE).args()
    before = here | {"q": here["q"].clone(), "cos": None, "sin": None}
    inverse_rope(before["q"], here["cos"], -here["sin"], here["position"])
    assert not torch.equal(before["q"], here["q"])
    outs = []
    for args in (here, before):
        outs.append(kernel.outputs(**args))
        kernel.launch(**args, out=outs[-1])
    for name, i in (("entries", 0), ("query", 1), ("weights", 2)):
        assert_bits_equal(name, outs[0][i], outs[1][i])
    turned, plain = case.args(), case.args() | {"q": case.q.clone(), "cos": None, "sin": None}
    fused.inverse_rope(plain["q"], turned["cos"], -turned["sin"], turned["position"])
    want = oracle.indexer_scores_topk(**plain)
    assert_bits_equal("oracle", oracle.indexer_scores_topk(**turned), want)
    assert int((outs[0][0].cpu() != want).any(dim=1).sum()) <= 1


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_half_an_angle_is_refused(name: str) -> None:
    args = indexer_case([(300, 2)], 16, rope_dim=64).to(DEVICE).args()
    with pytest.raises(ValueError, match=f"{name}: expected both cos and sin, or neither"):
        ops.indexer_scores_topk(**args | {name: None})
    with pytest.raises(ValueError, match=f"{name}: expected torch.float32"):
        ops.indexer_scores_topk(**args | {name: args[name].double()})
    wide = {"cos": torch.ones(400, 65, device=DEVICE), "sin": torch.ones(400, 65, device=DEVICE)}
    with pytest.raises(ValueError, match="cos: expected 1 to 64 pairs, got 65"):
        ops.indexer_scores_topk(**args | wide)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_any_number_of_tiles(tiles: int, more: int, monkeypatch: Any) -> None:
    tile = {"QUERIES": 1, "BLOCK": 16, "STAGES": 3}
    monkeypatch.setitem(kernel.CONFIG, "TILES", ((0, tile),))
    monkeypatch.setitem(select_kernel.CONFIG, "BLOCK", 64)
    entries = 16 * tiles + more
    case = indexer_case([(4 * entries - 1, 1)], 8, num_heads=4, seed=tiles)
    check_choice(case, choose(case))


@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
def test_equal_keys_tie_to_the_lower_entry(keys: Any) -> None:
    """Few different keys and numbers whose sums are exact, so equal keys score equal bits."""
    for levels in (1, 2, 5):
        case = indexer_case([(300, 2)], 32, keys, num_heads=4, levels=levels, is_rotated=False)
        case.q.copy_((2 * case.q.float()).round().clamp(-2, 2))
        case.head_weights.copy_(torch.tensor([0.5, -0.25, 1.0, 0.5]))
        assert_bits_equal("entries", choose(case), oracle.indexer_scores_topk(**case.args()))
        if levels == 1:
            assert choose(case).tolist() == [list(range(32))] * 2


def test_scores_of_zero_tie_to_the_lower_entry() -> None:
    case = indexer_case([(400, 1)], 32)
    case.q.zero_()
    assert choose(case)[0].tolist() == list(range(32))


def draw_case(data: st.DataObject) -> IndexerCase:
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, 200), st.integers(1, 2)), min_size=1, max_size=2)
    )
    is_rounded = data.draw(st.booleans())
    return indexer_case(
        spans, data.draw(st.sampled_from([1, 5, 16, 32, 100])),
        data.draw(st.sampled_from(["fp8", "mxfp4"])),
        num_heads=data.draw(st.sampled_from([1, 4, 8])),
        entries_per_page=data.draw(st.sampled_from([8, 32, 64])),
        padding=data.draw(st.integers(0, 1)), is_rotated=data.draw(st.booleans()),
        is_rounded=is_rounded, levels=data.draw(st.sampled_from([0, 0, 3])),
        dtype=torch.float32 if is_rounded and data.draw(st.booleans()) else torch.bfloat16,
        seed=data.draw(st.integers(0, 999)),
    )  # fmt: skip


@pytest.mark.parametrize("shard", range(FUZZ_SHARDS))
def test_choice_fuzzed(shard: int) -> None:
    """Half of DSV4_FUZZ_EXAMPLES in all, shared by tests that may run side by side."""

    @seed(shard)
    @settings(FUZZ, max_examples=1 + -(-FUZZ.max_examples // FUZZ_SHARDS))  # first the simplest
    @given(st.data())
    def check(data: st.DataObject) -> None:
        case = draw_case(data)
        old = dict(kernel.CONFIG)
        tile = {"BLOCK": [16, 64, 128], "QUERIES": [1, 2, 4], "STAGES": [1, 3]}
        drawn = {key: data.draw(st.sampled_from(values)) for key, values in tile.items()}
        kernel.CONFIG["TILES"] = ((0, drawn),)
        kernel.CONFIG["PROGRAMS"] = data.draw(st.sampled_from([1, 3, 100]))
        try:
            got = choose(case)
        finally:
            kernel.CONFIG.update(old)
        check_choice(case, got)

    check()


@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
def test_neighbours_splits_and_scratch_change_nothing(keys: Any, monkeypatch: Any) -> None:
    case = indexer_case([(300, 2), (30, 1), (501, 1)], 16, keys, num_heads=4, padding=1)
    want = choose(case)
    tiles = [((0, {"QUERIES": n, "BLOCK": 32, "STAGES": 3}),) for n in (1, 2, 4)]
    monkeypatch.setitem(kernel.CONFIG, "TILES", tiles[0])
    for name, value in (
        ("PROGRAMS", 1), ("PROGRAMS", 9), ("TILES", tiles[1]), ("TILES", tiles[2]),
        ("SCRATCH_BYTES", 1),
    ):  # fmt: skip
        with monkeypatch.context() as m:
            m.setitem(kernel.CONFIG, name, value)
            assert_bits_equal(name, choose(case), want)
    for t in (0, 3):
        assert_bits_equal(f"row {t} alone", choose(case.rows([t])), want[t : t + 1])
    order = torch.randperm(len(want), generator=torch.Generator().manual_seed(0))
    assert_bits_equal("shuffled", choose(case.rows(order)), want[order])


@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
def test_the_width_of_the_table_changes_nothing(keys: Any) -> None:
    """More pages than are used, and a table that is a view of a wider one."""
    spans, per_page = [(300, 1), (220, 1)], 32
    case = indexer_case(spans, 32, keys)
    want = choose(case)
    wide = indexer_case(spans, 32, keys, max_pages=5)
    assert_bits_equal("wide", choose(wide), want)
    moved = wide.to(DEVICE)
    args = moved.args() | {"page_table": moved.page_table[:, : -(-75 // per_page)]}
    assert_bits_equal("view", ops.indexer_scores_topk(**args).cpu(), want)
    short = case.to(DEVICE).args() | {"page_table": moved.page_table[:, :2]}
    got = ops.indexer_scores_topk(**short).cpu()
    assert int(got.max()) < 2 * per_page  # a query sees what the table holds


@pytest.mark.parametrize("poison", [0xFF, 0x00])
def test_unused_memory_changes_nothing(poison: int) -> None:
    """Tails of pages, free pages, the null page; outputs and scratch hold NaN before."""
    for keys in ("fp8", "mxfp4"):
        case = indexer_case([(301, 1), (158, 1)], 16, keys, num_heads=4).to(DEVICE)
        want = choose(case)
        live = torch.zeros_like(case.pages, dtype=torch.bool)
        clean = torch.zeros_like(case.pages)
        values = 128 if keys == "fp8" else 64
        for s, n in enumerate(case.num_entries):
            for w in range(n):
                page, row = int(case.page_table[s, w // 32]), w % 32
                live[page, row * values : (row + 1) * values] = True
                live[page, 32 * values + 4 * row : 32 * values + 4 * row + 4] = True
        clean.fill_(poison)
        case.pages.copy_(torch.where(live, case.pages, clean))
        out = kernel.outputs(**case.args())
        for x in out:
            x.fill_(NAN if x.is_floating_point() else -7)
        kernel.launch(**case.args(), out=out)
        assert_bits_equal("entries", out[0].cpu(), want)


def test_no_tokens_and_no_pages() -> None:
    none = indexer_case([(40, 1)], 8).rows(torch.zeros(0, dtype=torch.int64)).to(DEVICE)
    assert ops.indexer_scores_topk(**none.args()).shape == (0, 8)
    case = indexer_case([(2, 1)], 8).to(DEVICE)
    args = case.args() | {"page_table": case.page_table[:, :0]}
    assert ops.indexer_scores_topk(**args).tolist() == [[-1] * 8]


def test_op_contract() -> None:
    case = indexer_case([(100, 1)], 16, num_heads=4).to(DEVICE)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.indexer_scores_topk.op, (), case.args(), test_utils=tests)
    turned = indexer_case([(100, 1)], 16, num_heads=4, rope_dim=64).to(DEVICE).args()
    torch.library.opcheck(ops.indexer_scores_topk.op, (), turned, test_utils=tests)
    scores = select_scores(2, 40).to(DEVICE), torch.tensor([40, 3], device=DEVICE), 8
    torch.library.opcheck(ops.topk_select.op, scores, test_utils=tests)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.zeros(2, 8, 64, dtype=torch.bfloat16), r"q: expected shape \[T I 128\]"),
        ("q", torch.zeros(2, 8, 128), "q: expected torch.bfloat16 where it is not rounded"),
        ("head_weights", torch.zeros(2, 9), "head_weights: expected shape"),
        ("pages", torch.zeros(3, 7, dtype=torch.uint8), r"pages: expected \[count, 4224\]"),
        ("page_table", torch.zeros(1, 9), "page_table: expected torch.int32"),
        ("slot", torch.zeros(3, dtype=torch.int64), "slot: expected shape"),
        ("position", torch.zeros(2), "position: expected torch.int64"),
        ("topk", 0, "topk: expected an integer >= 1"),
        ("ratio", 0, "ratio: expected an integer >= 1"),
        ("entries_per_page", 0, "entries_per_page: expected an integer >= 1"),
    ],
)
def test_a_bad_argument_is_named(name: str, value: Any, message: str) -> None:
    case = indexer_case([(300, 2)], 16, is_rounded=False).to(DEVICE)
    value = value.to(DEVICE) if isinstance(value, Tensor) else value
    with pytest.raises(ValueError, match=message):
        ops.indexer_scores_topk(**case.args() | {name: value})


def test_topk_select_names_the_bad_argument() -> None:
    scores, lengths = torch.zeros(2, 8, device=DEVICE), torch.zeros(2, device=DEVICE).long()
    with pytest.raises(ValueError, match="topk: expected an integer >= 1, got 0"):
        ops.topk_select(scores, lengths, 0)
    with pytest.raises(ValueError, match="lengths: expected shape"):
        ops.topk_select(scores, lengths[:1], 3)
    with pytest.raises(ValueError, match="topk: expected room to merge it"):
        ops.topk_select(torch.zeros(1, 100000, device=DEVICE), lengths[:1], 20000)


# Planted bugs: what the checks above have to notice.


def planted(path: str, old: str, new: str, folder: Path) -> ModuleType:
    """The kernel file with one place changed, as a module of its own."""
    text = Path(path).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    file = folder / f"planted_{abs(hash((old, new)))}.py"
    file.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUGS = {
    "tile pinned to 0": ("start = tile * BLOCK + n * PER_PAGE", "start = n * PER_PAGE"),
    "sees one entry more": ("(position + 1) // ratio", "(position + 1 + ratio) // ratio"),
    "sees one entry fewer": ("(position + 1) // ratio", "position // ratio"),
    "no ReLU": ("tl.maximum(dots, 0.0)", "dots"),
    "no key scale": ("score *= scale.to(tl.float32, bitcast=True)", "score *= 1.0"),
    "no query scale": ("weight *= e8m0_value(byte)", "weight *= 1.0"),
    "last tile dropped": ("in tl.range(begin, end, num", "in tl.range(begin, end - 1, num"),
    "next tile again": ("own_table_ptr, tile + 1, tl.where", "own_table_ptr, tile, tl.where"),
    "keys of the first slot": ("tl.maximum(slot, 0) * table_stride", "0 * table_stride"),
}  # fmt: skip


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_planted_bugs_are_found(bug: str | None, tmp_path: Path, monkeypatch: Any) -> None:
    # Queries at the end of a window of 4, most of them before the last entry of their request.
    case = indexer_case([(290, 12), (243, 1), (123, 6)], 40).rows([1, 5, 9, 12, 13])
    case.q[:, ::2] *= 64  # so that queries have scales of their own
    old, new = ("", "") if bug is None else BUGS[bug]
    text = "REFERENCE = " if bug is None else old
    module = planted(str(kernel.__file__), text, new if bug else text, tmp_path)
    tile = {"QUERIES": 1, "BLOCK": 16, "STAGES": 1}
    monkeypatch.setitem(module.CONFIG, "TILES", ((0, tile),))
    monkeypatch.setitem(module.CONFIG, "PROGRAMS", 8)
    args = case.to(DEVICE).args()
    out = module.outputs(**args)
    module.launch(**args, out=out)
    if bug is None:
        check_choice(case, out[0].cpu())
    else:
        with pytest.raises(AssertionError):
            check_choice(case, out[0].cpu())


def test_a_fallback_to_the_latest_entries_is_found() -> None:
    case = indexer_case([(1023, 1)], 32)
    for start in (0, 256 - 32):
        with pytest.raises(AssertionError, match="in place of"):
            check_choice(case, torch.arange(start, start + 32, dtype=torch.int32)[None])
    with pytest.raises(AssertionError, match="not ascending"):
        check_choice(case, torch.full((1, 32), -1, dtype=torch.int32))
