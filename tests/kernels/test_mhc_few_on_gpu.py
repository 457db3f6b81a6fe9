"""mHC of few tokens in small blocks: the bits of the cluster kernel, launch after launch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels.mhc import mhc_post_pre_few_sm90 as few
from dsv4.kernels.mhc import mhc_post_pre_sm90 as cluster
from dsv4.testing.cases.mhc import mhc_case
from dsv4.testing.numeric import assert_bits_equal

pytestmark = pytest.mark.gpu

NAMES = ("streams", "y", "post", "comb")
WEIGHTS = ("fn", "scale", "base", "norm", "iters", "norm_eps", "eps", "quantise")


def run(kernel: Any, args: dict[str, Any]) -> tuple[Tensor, ...]:
    """Results of one kernel, which were NaN before."""
    out = kernel.outputs(**args)
    for x in out:
        x.view(torch.uint8).fill_(0xFF)
    kernel.launch(**args, out=out)
    return out[: len(NAMES)]


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...], of: str = "") -> None:
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert_bits_equal(f"{of} {name}", g.view(torch.uint8), w.view(torch.uint8))


@pytest.mark.parametrize("D", [1024, 2048, 3072, 4096, 5120, 7168])
@pytest.mark.parametrize("norm", [torch.bfloat16, torch.float32])
def test_bits_of_the_cluster_kernel(D: int, norm: torch.dtype) -> None:
    """Every number of tokens it takes; each token also against its run among eight."""
    eight = mhc_case("mhc_post_pre", 8, D, device="cuda", seed=D)
    eight["norm"] = eight["norm"].to(norm) * 1.001
    want = run(cluster, eight)
    for T in range(1, few.most_tokens(D) + 1):
        some = {k: v[:T] if k in ("o", "x", "post", "comb") else v for k, v in eight.items()}
        assert_same(run(few, some), tuple(w[:T] for w in want), f"T={T}")


@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("size", [0.0, 1e-18, 1e18, float("inf"), float("nan")])
def test_extreme_streams_and_gains(size: float, iters: int) -> None:
    args = mhc_case("mhc_post_pre", 4, 4096, device="cuda", iters=iters)
    args["x"][1] *= size
    args["o"][2] *= size
    args["x"][3, 2, 77] = size
    args["scale"] = torch.tensor([50.0, 80.0, 60.0], device="cuda")
    assert_same(run(few, args), run(cluster, args))


def chain(kernel: Any, args: dict[str, Any], layers: list[dict[str, Any]]) -> list[Tensor]:
    """Sub-layers that return their input; each reads what the one before has written."""
    o, x, post, comb = (args[k] for k in ("o", "x", "post", "comb"))
    seen = []
    for weights in layers:
        out = kernel.outputs(o, x, post, comb, **weights)
        kernel.launch(o, x, post, comb, **weights, out=out)
        x, o, post, comb = out[: len(NAMES)]
        seen += [x, o, post, comb]
    return seen


def layers_of(D: int, count: int) -> list[dict[str, Any]]:
    cases = [mhc_case("mhc_post_pre", 0, D, device="cuda", weight_seed=i) for i in range(count)]
    return [{k: c[k] for k in WEIGHTS} for c in cases]


@pytest.mark.parametrize(("T", "D"), [(1, 4096), (8, 4096), (1, 7168), (4, 7168)])
def test_a_thousand_launches_in_a_row(T: int, D: int) -> None:
    """One launch starts while the one before ends. Sizes alternate on the same memory."""
    layers = layers_of(D, 10)
    args = mhc_case("mhc_post_pre", T, D, device="cuda")
    want, last = chain(cluster, args, layers), mhc_case("mhc_post_pre", 3, 1024, device="cuda")
    between = run(cluster, last)
    for i in range(100):
        got = chain(few, args, layers)
        other = run(few, last) if i % 7 == 0 else between
        for j, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_bits_equal(f"{i} {j}", g, w)
        assert_same(other, between)


def captured(
    args: dict[str, Any], layers: list[dict[str, Any]], pool: Any = None
) -> tuple[Any, list[Tensor]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        got = chain(few, args, layers)
    return graph, got


@pytest.mark.parametrize("T", [1, 5, 8])
def test_replays_of_two_graphs_in_turns(T: int) -> None:
    """The streams change from replay to replay, and a launch outside comes between."""
    layers = layers_of(4096, 12)
    args = mhc_case("mhc_post_pre", T, 4096, device="cuda")
    chain(few, args, layers)
    graphs = [captured(args, layers) for _ in range(2)]
    for i in range(40):
        new = mhc_case("mhc_post_pre", T, 4096, device="cuda", seed=i)
        for k in ("o", "x", "post", "comb"):
            args[k].copy_(new[k])
        want = chain(cluster, args, layers)
        graph, got = graphs[i % 3 % 2]
        for g in got:
            g.view(torch.uint8).fill_(0xFF)
        graph.replay()
        for j, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_bits_equal(f"{i} {j}", g, w)
        assert_same(tuple(chain(few, args, layers[:1])), tuple(want[: len(NAMES)]))


def test_graphs_of_one_pool_in_turns() -> None:
    """As an engine records its steps: each capture lets go of what the one before it kept."""
    layers, sizes = layers_of(4096, 12), (8, 4, 2, 1)
    cases = [mhc_case("mhc_post_pre", T, 4096, device="cuda", seed=T) for T in sizes]
    wants = [[x.clone() for x in chain(cluster, args, layers)] for args in cases]
    pool = torch.cuda.graph_pool_handle()
    for args in cases:
        chain(few, args, layers)
    graphs = [captured(args, layers, pool) for args in cases]
    for i in range(40):
        at = (i * 3 + i // 4) % len(sizes)
        graph, got = graphs[at]
        graph.replay()
        for j, (g, w) in enumerate(zip(got, wants[at], strict=True)):
            assert_bits_equal(f"{i} {sizes[at]} {j}", g, w)


def test_two_streams_at_once() -> None:
    """Graphs side by side, and launches side by side."""
    layers = layers_of(4096, 30)
    cases = [mhc_case("mhc_post_pre", T, 4096, device="cuda", seed=T) for T in (1, 8)]
    wants = [chain(cluster, args, layers) for args in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(10):
        gots = []
        for stream, args in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                gots.append(chain(few, args, layers))
        torch.cuda.synchronize()
        for want, got in zip(wants, gots, strict=True):
            for g, w in zip(got, want, strict=True):
                assert_bits_equal("launches", g, w)
    graphs = [captured(args, layers) for args in cases]
    for _ in range(20):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for want, (_, got) in zip(wants, graphs, strict=True):
            for g, w in zip(got, want, strict=True):
                assert_bits_equal("graphs", g, w)


def test_a_graph_of_two_streams() -> None:
    """Launches that a capture puts side by side do not use the same memory."""
    layers = layers_of(4096, 20)
    cases = [mhc_case("mhc_post_pre", 2, 4096, device="cuda", seed=i) for i in range(2)]
    wants = [chain(cluster, args, layers) for args in cases]
    chain(few, cases[0], layers)
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        first = chain(few, cases[0], layers)
        with torch.cuda.stream(side):
            second = chain(few, cases[1], layers)
        torch.cuda.current_stream().wait_stream(side)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        for want, got in zip(wants, (first, second), strict=True):
            for g, w in zip(got, want, strict=True):
                assert_bits_equal("both", g, w)
