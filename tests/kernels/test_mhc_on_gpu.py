"""mHC kernels beyond the interpreter: large batches, graphs, chains, addresses, torch.compile."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels import mhc as kernels
from dsv4.ops import mhc as ops
from dsv4.reference import mhc as oracle
from dsv4.testing.cases.mhc import OPS, mhc_case
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = pytest.mark.gpu

PER_TOKEN = ("o", "x", "post", "comb")


def repeated(args: dict[str, Any], T: int) -> dict[str, Any]:
    """The tokens of a case over and over, T in all."""

    def more(v: Tensor) -> Tensor:
        return v.repeat(-(-T // len(v)), *[1] * (v.dim() - 1))[:T].contiguous()

    return {k: more(v) if k in PER_TOKEN else v for k, v in args.items()}


def results(op: str, args: dict[str, Any]) -> list[Tensor]:
    got = getattr(ops, op)(**args)
    return list(got) if isinstance(got, tuple) else [got]


@pytest.mark.parametrize("D", [1024, 2048, 3072, 4096, 7168])
@pytest.mark.parametrize("op", OPS)
def test_8192_tokens_have_the_bits_of_one(op: str, D: int) -> None:
    """More tiles than clusters, the last one partial; every token against its run alone."""
    few = mhc_case(op, 41, D, quantise=True, device="cuda", seed=D)
    alone = results(op, few)
    many = results(op, repeated(few, 8190))
    for i, (one, all_) in enumerate(zip(alone, many, strict=True)):
        want = one.view(torch.uint8)
        want = want.repeat(200, *[1] * (want.dim() - 1))[: len(all_)]
        assert_bits_equal(f"{i}", all_.view(torch.uint8), want)


@pytest.mark.parametrize("D", [4096, 7168])
@pytest.mark.parametrize("op", ["mhc_post_pre", "mhc_pre_norm", "hc_head_norm"])
def test_the_portable_kernel_at_full_size(op: str, D: int) -> None:
    """BF16 products on the tensor cores, which a Hopper GPU leaves to the other kernel."""
    args = mhc_case(op, 50, D, quantise=True, device="cuda")
    portable, fast = getattr(kernels, op), results(op, args)
    out = portable.outputs(**args)
    portable.launch(**args, out=out)
    exact = getattr(oracle, op)(**{k: v.double() if isinstance(v, Tensor) else v
                                   for k, v in args.items()})  # fmt: skip
    same = getattr(oracle, op)(**args)
    if op == "hc_head_norm":
        exact, same = (exact,), (same,)
    for i, x in enumerate(fast):
        if x.element_size() > 1:
            assert_as_exact_as(f"{i}", out[i], same[i], exact[i])
    one = mhc_case(op, 1, D, quantise=True, device="cuda")
    alone = portable.outputs(**one)
    portable.launch(**one, out=alone)
    for i in range(len(fast)):
        assert_bits_equal(f"{i}", alone[i].view(torch.uint8), out[i][:1].view(torch.uint8))


def chain(x: Tensor, weights: list[dict[str, Any]]) -> list[Tensor]:
    """Sub-layers that return their input: every launch reads what the one before has written."""
    y, post, comb, *_ = ops.mhc_pre_norm(x, **weights[0])
    seen = [y, post, comb]
    for w in weights[1:]:
        x, y, post, comb, *_ = ops.mhc_post_pre(y, x, post, comb, **w)
        seen += [x, y, post, comb]
    return seen


def chain_case(T: int, D: int) -> tuple[Tensor, list[dict[str, Any]]]:
    x = mhc_case("mhc_pre_norm", T, D, device="cuda")["x"]
    cases = [mhc_case("mhc_pre_norm", 0, D, device="cuda", weight_seed=i) for i in range(12)]
    return x, [{k: v for k, v in c.items() if k != "x"} for c in cases]


@pytest.mark.parametrize("D", [256, 4096, 7168])
@pytest.mark.parametrize("T", [1, 40, 600])
def test_a_chain_in_a_graph_has_the_bits_of_single_launches(T: int, D: int) -> None:
    """Launches overlap in the graph; here each waits for the device."""
    x, weights = chain_case(T, D)
    y, post, comb, *_ = ops.mhc_pre_norm(x, **weights[0])
    want, streams = [y, post, comb], x
    for w in weights[1:]:
        torch.cuda.synchronize()
        streams, y, post, comb, *_ = ops.mhc_post_pre(y, streams, post, comb, **w)
        want += [streams, y, post, comb]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x, weights)
    for _ in range(20):
        for g in got:
            g.view(torch.uint8).fill_(0xFF)
        graph.replay()
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_bits_equal(f"{i}", g, w)
    other = x.flip(0).contiguous()
    x.copy_(other)
    graph.replay()
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_bits_equal(f"{i} flipped", g, w.flip(0).contiguous())


@pytest.mark.parametrize("op", OPS)
def test_addresses_beyond_two_gigabytes(op: str) -> None:
    """More than 2^31 bytes of streams, and more than 2^31 elements of them."""
    few = mhc_case(op, 16, 4096, device="cuda")
    alone, many = results(op, few), results(op, repeated(few, 2**17 + 16))
    for i, (one, all_) in enumerate(zip(alone, many, strict=True)):
        assert_bits_equal(f"{i} last", all_[-16:].view(torch.uint8), one.view(torch.uint8))
        assert_bits_equal(f"{i} first", all_[:16].view(torch.uint8), one.view(torch.uint8))


def test_torch_compile_gives_the_same_bits() -> None:
    args = mhc_case("mhc_post_pre", 5, 4096, quantise=True, device="cuda")
    compiled = torch.compile(lambda: ops.mhc_post_pre(**args), fullgraph=True)
    for i, (got, want) in enumerate(zip(compiled(), ops.mhc_post_pre(**args), strict=True)):
        assert_bits_equal(f"{i}", got.view(torch.uint8), want.view(torch.uint8))
