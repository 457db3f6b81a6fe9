"""mHC of many tokens: the bits of the cluster kernel, launch after launch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels.common import cuda
from dsv4.kernels.mhc import mhc_post_pre_many_sm90 as many
from dsv4.kernels.mhc import mhc_post_pre_sm90 as cluster
from dsv4.testing.cases.mhc import mhc_case
from dsv4.testing.numeric import assert_bits_equal

pytestmark = pytest.mark.gpu

NAMES = ("streams", "y", "post", "comb", "value", "scale")
PER_TOKEN = ("o", "x", "post", "comb")
LEAST = many.CONFIG["MIN_TOKENS"]


def case(T: int, D: int, distinct: int = 299, **options: Any) -> dict[str, Any]:
    """Some tokens over and over; their number shares no factor with that of a tile."""
    args = mhc_case("mhc_post_pre", min(T, distinct), D, device="cuda", seed=D, **options)

    def more(v: Tensor) -> Tensor:
        return v.repeat(-(-T // len(v)), *[1] * (v.dim() - 1))[:T].contiguous()

    return {k: more(v) if k in PER_TOKEN else v for k, v in args.items()}


def empty(kernel: Any, args: dict[str, Any]) -> tuple[Tensor, ...]:
    """Results to come and working memory, NaN as yet."""
    out = kernel.outputs(**args)
    for x in out:
        x.view(torch.uint8).fill_(0xFF)
    return out


def run(kernel: Any, args: dict[str, Any]) -> tuple[Tensor, ...]:
    out = empty(kernel, args)
    kernel.launch(**args, out=out)
    return out[: len(NAMES)]


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...], of: str = "") -> None:
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert_bits_equal(f"{of} {name}", g.view(torch.uint8), w.view(torch.uint8))


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("D", [4096, 7168])
@pytest.mark.parametrize("T", [LEAST, 257, 1000, 8190, 8192])
def test_bits_of_the_cluster_kernel(T: int, D: int, quantise: bool) -> None:
    args = case(T, D, 1000 if T == 1000 else 41, quantise=quantise)
    assert_same(run(many, args), run(cluster, args))


@pytest.mark.parametrize("norm", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("D", [1024, 2048, 3072, 4096, 5120, 6144, 7168])
def test_every_width(D: int, quantise: bool, norm: torch.dtype) -> None:
    args = case(LEAST + 333, D, 61, quantise=quantise)
    args["norm"] = args["norm"].to(norm) * 1.001
    assert_same(run(many, args), run(cluster, args))


@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("size", [0.0, 1e-18, 1e18, float("inf"), float("nan")])
def test_extreme_streams_and_gains(size: float, iters: int) -> None:
    args = case(LEAST + 5, 4096, iters=iters, quantise=True)
    for first in (1, LEAST - 16, LEAST):
        args["x"][first] *= size
        args["o"][first + 1] *= size
        args["x"][first + 2, 2, 77] = size
    args["scale"] = torch.tensor([50.0, 80.0, 60.0], device="cuda")
    assert_same(run(many, args), run(cluster, args))


@pytest.mark.parametrize("lag", [2, 3])
def test_tokens_that_are_finished_later(lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = case(2000, 4096, 41)
    want = run(cluster, args)
    monkeypatch.setitem(many.CONFIG, "LAG", lag)
    assert_same(run(many, args), want)


@pytest.mark.parametrize("D", [1024, 4096, 7168])
def test_a_hundred_launches_in_a_row_and_replays(D: int) -> None:
    """One starts while the one before ends; numbers of tokens alternate on the same flags."""
    cases = [case(T, D, 41) for T in (LEAST, LEAST + 700, LEAST + 17)] * 4
    wants = [run(cluster, args) for args in cases]

    def in_a_row(outs: list[tuple[Tensor, ...]]) -> None:
        for args, out in zip(cases, outs, strict=True):
            many.launch(**args, out=out)

    for i in range(9):
        outs = [empty(many, args) for args in cases]
        in_a_row(outs)
        for out, want in zip(outs, wants, strict=True):
            assert_same(out[: len(NAMES)], want, f"{i}")
    assert not cuda.zeroed_counters(torch.device("cuda", 0), 4096).any()
    outs, graph = [empty(many, args) for args in cases], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_a_row(outs)
    for i in range(9):
        for x in (x for out in outs for x in out):
            x.view(torch.uint8).fill_(0xFF)
        graph.replay()
        for out, want in zip(outs, wants, strict=True):
            assert_same(out[: len(NAMES)], want, f"replay {i}")


def test_a_chain_reads_what_the_launch_before_has_written() -> None:
    args = case(LEAST + 100, 4096, 41)
    found = []
    for kernel in (cluster, many):
        now = dict(args)
        for _ in range(12):
            out = kernel.outputs(**now)
            kernel.launch(**now, out=out)
            now |= dict(zip(("x", "o", "post", "comb"), out[:4], strict=True))
        found.append([now[k] for k in ("x", "o", "post", "comb")])
    for g, w in zip(*found, strict=True):
        assert_bits_equal("end", g, w)


def test_two_streams_at_once() -> None:
    """Two of these launches at most leave room for the blocks that the other waits for."""
    cases = [case(T, 4096, 41) for T in (LEAST, LEAST + 900)]
    wants = [run(cluster, args) for args in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    gots = []
    for _ in range(20):
        for stream, args, want in zip(streams, cases, wants, strict=True):
            with torch.cuda.stream(stream):
                gots.append((run(many, args), want))
    torch.cuda.synchronize()
    for got, want in gots:
        assert_same(got, want)
