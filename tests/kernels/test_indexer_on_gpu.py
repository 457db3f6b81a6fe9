"""What the interpreter cannot show: CUDA graphs, real sizes, the Hopper variant, far addresses."""

import os
from typing import Any

import pytest
import torch

from dsv4.kernels.indexer import (
    indexer_scores_topk,
    indexer_scores_topk_sm90,
    topk_select,
    topk_select_sm90,
)
from dsv4.ops import indexer as ops
from dsv4.reference import paged_indexer as oracle
from dsv4.testing.cases.indexer import IndexerCase, indexer_case, select_scores
from dsv4.testing.numeric import assert_bits_equal

pytestmark = pytest.mark.gpu
FUZZ_EXAMPLES = int(os.environ.get("DSV4_FUZZ_EXAMPLES", "200"))


@pytest.fixture(params=["triton", "sm90"])
def variant(request: Any) -> tuple[Any, Any]:
    """The kernels of both ops."""
    if request.param == "triton":
        return indexer_scores_topk, topk_select
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    if reason := topk_select_sm90.SPEC.requires():
        pytest.skip(reason)
    return indexer_scores_topk_sm90, topk_select_sm90


def run(kernel: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    out = kernel.outputs(*args, **kwargs)
    for x in out:
        x.fill_(float("nan") if x.is_floating_point() else -7)
    kernel.launch(*args, **kwargs, out=out)
    return out[0]


@pytest.mark.parametrize("levels", [0, 1, 50])
@pytest.mark.parametrize(
    ("S", "topk"),
    [(2048, 512), (8191, 512), (8192, 1024), (8193, 512), (65536, 512), (262144, 1024)],
)
def test_topk_select_at_real_sizes(variant: Any, S: int, topk: int, levels: int) -> None:
    scores = select_scores(6, S, levels, seed=S)
    scores[2, ::5], scores[2, 1::9], scores[3] = float("nan"), float("inf"), -0.0
    lengths = torch.tensor([S, topk, topk + 1, S - 1, S // 2, 0])
    got = run(variant[1], scores.cuda(), lengths.cuda(), topk)
    assert_bits_equal("places", got.cpu(), oracle.topk_select(scores, lengths, topk))


def test_topk_select_fuzzed(variant: Any) -> None:
    """Random rows; many of few different values, which is where an exact choice is hard."""
    g = torch.Generator().manual_seed(0)
    for i in range(FUZZ_EXAMPLES):
        S, T = (int(torch.randint(1, n, (), generator=g)) for n in (12000, 5))
        topk = int(torch.randint(1, 5, (), generator=g)) * 37 % 97
        scores = select_scores(T, S, i % 4 * 7, seed=i) * 2.0 ** (i % 40 * 3 - 60)
        lengths = torch.randint(0, S + 1, (T,), generator=g)
        got = run(variant[1], scores.cuda(), lengths.cuda(), topk)
        assert_bits_equal(f"places of {i}", got.cpu(), oracle.topk_select(scores, lengths, topk))


def rows_that_differ(case: IndexerCase, got: torch.Tensor) -> int:
    """Rows that differ from the oracle; one entry at most, where scores tie within rounding."""
    want = oracle.indexer_scores_topk(**case.args())
    differs = (got != want).any(dim=1)
    for t in differs.nonzero()[:, 0].tolist():
        apart = set(got[t].tolist()) ^ set(want[t].tolist())
        assert len(apart) <= 2, f"row {t}: {sorted(apart)}"
    return int(differs.sum())


@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
@pytest.mark.parametrize(
    ("spans", "topk"),
    [
        ([(32000, 2), (30, 1), (13000, 3)], 512), ([(4095, 1)] * 40, 1024),
        ([(3000, 700), (1, 50)], 512), ([(260000, 1), (9000, 1)], 512), ([(6000, 301)], 1024),
    ],
)  # fmt: skip
def test_choice_at_real_sizes(variant: Any, spans: Any, topk: int, keys: Any) -> None:
    case = indexer_case(
        spans, topk, keys, num_heads=64, entries_per_page=64, padding=1, device="cuda"
    )
    got = run(variant[0], **case.args())
    assert rows_that_differ(case, got) <= 1 + len(got) // 50


@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
def test_a_token_alone_equals_the_token_among_many(variant: Any, keys: Any) -> None:
    """Decode of one row, decode of many, and a prompt share no launch shape, but all bits."""
    case = indexer_case(
        [(20000, 280), (9000, 3)], 512, keys, num_heads=64, entries_per_page=64, device="cuda"
    )
    many = run(variant[0], **case.args())
    for rows in ([0], [279], [280, 281, 282], list(range(100, 164)), [5, 281]):
        some = run(variant[0], **case.rows(rows).args())
        assert_bits_equal(f"rows {rows[:3]}", some, many[rows])


def test_a_graph_replays_with_the_step_in_its_tensors(variant: Any) -> None:
    kernel = variant[0]
    case = indexer_case([(30000, 8)] * 3, 512, num_heads=64, entries_per_page=64, device="cuda")
    static = case.rows([0, 8, 16])
    args = static.args()
    out = kernel.outputs(**args)
    kernel.launch(**args, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(**args, out=out)
    for i in range(24):
        step = case.rows([i % 8, 8 + (5 * i) % 8, 16 + (3 * i) % 8])
        if i % 4 == 3:
            step.slot[1] = -1
        if i % 5 == 4:
            step.position[0] = 1000 + i
        for name in ("q", "head_weights", "slot", "position"):
            getattr(static, name).copy_(getattr(step, name))
        out[0].fill_(-9)
        graph.replay()
        assert_bits_equal(f"step {i}", out[0], run(kernel, **step.args()))
        graph.replay()
        assert_bits_equal(f"step {i} again", out[0], run(kernel, **step.args()))


def test_pages_beyond_two_gigabytes(variant: Any) -> None:
    case = indexer_case([(9000, 2)], 512, num_heads=64, entries_per_page=64, device="cuda")
    want = run(variant[0], **case.args())
    stride = case.pages.shape[1]
    shift = 2**31 // stride + 5
    pages = torch.full((shift + len(case.pages), stride), 0xFF, dtype=torch.uint8, device="cuda")
    pages[shift:] = case.pages
    table = torch.where(case.page_table > 0, case.page_table + shift, 0)
    args = case.args() | {"pages": pages, "page_table": table.to(torch.int32)}
    assert_bits_equal("entries", run(variant[0], **args), want)


def test_torch_compile_records_the_op() -> None:
    args = indexer_case([(3000, 2)], 64, device="cuda").args()

    @torch.compile(fullgraph=True)
    def step(q: torch.Tensor) -> torch.Tensor:
        return ops.indexer_scores_topk(**args | {"q": q}) + 1

    want = ops.indexer_scores_topk(**args) + 1
    assert_bits_equal("entries", step(args["q"]), want)
