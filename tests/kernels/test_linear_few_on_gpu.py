"""FP8 linears of 17 to 64 tokens on Hopper: bits of a token alone, of Triton's, in a graph."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels.linear import (
    linear_fp8,
    linear_fp8_sm90,
    linear_fp8_w8a8,
    linear_fp8_w8a8_sm90,
)
from dsv4.ops.quant import fp8_act_quantize
from dsv4.testing.cases.linear import tokens
from dsv4.testing.numeric import assert_bits_equal
from support.real_sizes import LINEAR_SHAPES, fp8_weight_on_gpu, needs_hopper

pytestmark = pytest.mark.gpu

# The last has no whole blocks of 256 rows: sixteen tokens at a time, in clusters.
SHAPES = {**LINEAR_SHAPES, "few_rows": (384, 2048, 1)}
SPLIT = ["flash-wo_a", "flash-wo_b", "flash-wq_a_wkv", "pro-wo_b"]  # chunks in several blocks
# One of each form: beside those, one chunk, and x in two passes from 33 tokens on (pro-).
FORMS = [*SPLIT, "flash-wq_b", "pro-wq_b", "few_rows"]
COUNTS = (17, 24, 31, 32, 33, 48, 64)
MODES = {  # what happens to x -> the kernel and the one in Triton
    "w8a16": (linear_fp8_sm90, linear_fp8),
    "w8a8": (linear_fp8_sm90, linear_fp8),
    "fp8": (linear_fp8_w8a8_sm90, linear_fp8_w8a8),
}


@pytest.fixture(autouse=True)
def only_hopper() -> None:
    needs_hopper()


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks give up at once, and the last one does the work of all that did."""
    monkeypatch.setattr(linear_fp8_sm90, "PATIENCE", -1)
    linear_fp8_sm90.find_plan.cache_clear()
    yield
    linear_fp8_sm90.find_plan.cache_clear()


def inputs(name: str, mode: str, T: int = 64, kind: str = "e8m0") -> tuple[Any, ...]:
    """Arguments of the kernels of `mode`, for T tokens; FP32 scales are no powers of two."""
    N, K, groups = SHAPES[name]
    weight, scale = fp8_weight_on_gpu(N, K)
    if kind == "f32":
        scale = scale.float() * 1.3
    x = tokens(T, groups * K, device="cuda")
    x[min(5, T - 1)] *= 1e4 / x[min(5, T - 1)].abs().max()
    if mode == "fp8":
        return *fp8_act_quantize(x), weight, scale, groups
    return x, weight, scale, groups, mode == "w8a8"


def first_tokens(args: tuple[Any, ...], mode: str, start: int, end: int) -> tuple[Any, ...]:
    """The same for the tokens from `start` up to `end`."""
    count = 2 if mode == "fp8" else 1
    return *(x[start:end] for x in args[:count]), *args[count:]


def result(kernel: ModuleType, args: tuple[Any, ...]) -> Tensor:
    """y, NaN where nothing is written. Counters must be zero afterwards."""
    out = kernel.outputs(*args)
    for t in out[:2]:
        t.fill_(float("nan"))
    kernel.launch(*args, out)
    assert not out[2].any(), f"counters: {out[2].nonzero().flatten().tolist()}"
    return out[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "kind"), [(n, "e8m0") for n in SHAPES] + [(n, "f32") for n in FORMS]
)
def test_bits_of_one_token_and_of_triton(name: str, mode: str, kind: str) -> None:
    kernel, triton_kernel = MODES[mode]
    args = inputs(name, mode, 64, kind)
    want = result(triton_kernel, args)
    for T in COUNTS:
        got = result(kernel, first_tokens(args, mode, 0, T))
        assert_bits_equal(f"{T} tokens", got, want[:T])
    for t in (0, 7, 33, 63):
        alone = result(kernel, first_tokens(args, mode, t, t + 1))
        assert_bits_equal(f"token {t} alone", alone, want[t : t + 1])
    got = result(kernel, first_tokens(args, mode, 30, 51))
    assert_bits_equal("21 tokens from the 30th on", got, want[30:51])


@pytest.mark.parametrize("T", [20, 64])
@pytest.mark.parametrize("name", FORMS)
def test_a_token_of_nan_is_of_no_other_concern(name: str, T: int) -> None:
    args = inputs(name, "w8a16", T)
    want = result(linear_fp8_sm90, args)
    args[0][3] = float("nan")
    got = result(linear_fp8_sm90, args)
    assert bool(got[3].isnan().all())
    others = [t for t in range(T) if t != 3]
    assert_bits_equal("others", got[others], want[others])


@pytest.mark.parametrize("T", [17, 64])
@pytest.mark.parametrize("name", FORMS)
def test_ten_runs_and_ten_replays_are_equal(name: str, T: int) -> None:
    args = inputs(name, "w8a16", T)
    want = result(linear_fp8_sm90, args)
    for i in range(10):
        assert_bits_equal(f"run {i}", result(linear_fp8_sm90, args), want)
    out = linear_fp8_sm90.outputs(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = linear_fp8_sm90.outputs(*args)
        for _ in range(3):
            linear_fp8_sm90.launch(*args, out)
            linear_fp8_sm90.launch(*args, inside)
    for i in range(10):
        for y, partial, *_ in (out, inside):
            y.fill_(float("nan"))
            partial.fill_(float("nan"))
        graph.replay()
        for y, _, counters, *_ in (out, inside):
            assert_bits_equal(f"replay {i}", y, want)
            assert not counters.any()


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("T", [17, 33, 64])
@pytest.mark.parametrize("name", SPLIT)
def test_shares_that_blocks_left_to_the_last_one(name: str, T: int) -> None:
    args = inputs(name, "w8a16", T)
    want = result(linear_fp8, args)
    for i in range(5):
        assert_bits_equal(f"run {i}", result(linear_fp8_sm90, args), want)


def test_two_streams_at_the_same_time() -> None:
    """Neither has room for all of its blocks, which wait for each other."""
    both = [inputs("flash-wo_b", "w8a16", 64), inputs("flash-shared_w13", "w8a16", 40)]
    want = [result(linear_fp8, args) for args in both]
    streams = [torch.cuda.Stream() for _ in both]
    got: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(50):
        for i, (args, stream) in enumerate(zip(both, streams, strict=True)):
            with torch.cuda.stream(stream):
                out = linear_fp8_sm90.outputs(*args)
                linear_fp8_sm90.launch(*args, out)
                got[i].append(out[0])
    torch.cuda.synchronize()
    for i, ys in enumerate(got):
        for n, y in enumerate(ys):
            assert_bits_equal(f"stream {i}, launch {n}", y, want[i])


@pytest.mark.parametrize("T", [17, 33, 64])
def test_a_chain_in_a_graph_waits_for_its_input(T: int) -> None:
    """Each starts while the one that writes its input still runs."""
    names = ["flash-shared_w13", "flash-shared_w2", "flash-wq_a", "flash-wq_b", "flash-wo_a"]
    weights = [(*fp8_weight_on_gpu(*SHAPES[name][:2]), SHAPES[name][2]) for name in names]
    x = tokens(T, 4096, device="cuda")

    def chain(y: Tensor, wait: bool) -> list[Tensor]:
        found = []
        for weight, scale, groups in weights:
            args = y[:, : groups * weight.shape[1]].contiguous(), weight, scale, groups, False
            out = linear_fp8_sm90.outputs(*args)
            linear_fp8_sm90.launch(*args, out)
            if wait:
                torch.cuda.synchronize()
            y = out[0]
            found.append(y)
        return found

    want = chain(x, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x, False)
    for _ in range(20):
        for y in got:
            y.fill_(float("nan"))
        graph.replay()
        for i, (y, w) in enumerate(zip(got, want, strict=True)):
            assert_bits_equal(f"y[{i}]", y, w)
