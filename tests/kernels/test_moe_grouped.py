"""Routed experts of many tokens, products grouped by expert, against the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.kernels.moe import moe_routed as portable
from dsv4.kernels.moe import moe_routed_grouped as grouped
from dsv4.ops import moe as ops
from dsv4.reference import experts as oracle
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.moe import GROUPS, MoeCase
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
FORMATS = sorted(GROUPS)
SHAPES = {"nano": (256, 128, 16), "odd": (384, 256, 5)}
FLASH = 4096, 2048, 256
# Tokens -> rows of a block where three experts share them 6 : 3 : 1: every tile, whole and in part.
TILES = {5: 16, 40: 32, 100: 64, 310: 128}


def random_case(T: int, shape: str, **options: Any) -> MoeCase:
    return MoeCase.random(T, *SHAPES[shape], K=2, device=DEVICE, **options)


def tile_case(T: int, **options: Any) -> MoeCase:
    case = MoeCase.random(T, 256, 128, 3, K=1, device=DEVICE, **options)
    ids = torch.bucketize(
        torch.arange(T, device=DEVICE) * 7 % 10, torch.tensor([5, 8], device=DEVICE)
    )
    return replace(case, ids=ids[:, None].to(torch.int32))


def run(case: MoeCase) -> Tensor:
    """The op; results and working memory start as NaN and as integers that are no index."""
    args = case.args()
    out = grouped.outputs(**args)
    for x in out:
        x.fill_(torch.nan if x.is_floating_point() else -(2**30))
    grouped.launch(**args, out=out)
    return out[0]


def check(case: MoeCase) -> Tensor:
    got = run(case)
    same, exact = oracle.moe_routed(**case.args()), oracle.moe_routed(**case.wide().args())
    assert_as_exact_as("moe_routed", got, same, exact)
    assert (got.double() - exact).norm() <= 3e-3 * exact.norm()
    return got


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_oracle(shape: str, format: str) -> None:
    check(random_case(4, shape, format=format, has_shared=False))


@pytest.mark.parametrize("T", TILES)
def test_every_tile_equals_the_oracle(T: int) -> None:
    case = tile_case(T, format=FORMATS[T // 20 % 2], has_shared=False, seed=T)
    assert grouped.tile(case.ids.numel(), 3, 256, 128, grouped.CONFIG)["BM"] == TILES[T]
    check(case)


def test_every_code_and_scale_is_exact() -> None:
    """One-hot tokens read single weights back, of every column of a step and every code."""
    D, F = 256, 128
    case = MoeCase.random(256, D, F, 1, K=1, has_shared=False, device=DEVICE)
    w1, s1, w3, s3, w2, s2 = (w.clone() for w in case.stored)
    w1.fill_(0x22), s1.fill_(127)  # gate 1 everywhere
    w3[:] = torch.arange(F * D // 2, device=DEVICE).to(torch.uint8).view(F, D // 2)
    s3[:] = 70 + torch.arange(D // 32, device=DEVICE).to(torch.uint8) * 8
    w2.zero_(), s2.fill_(127)
    row = torch.arange(F, device=DEVICE)
    w2[:, row, row // 2] = torch.where(row % 2 == 0, 2, 32).to(torch.uint8)  # the identity
    x = torch.eye(D, dtype=torch.bfloat16, device=DEVICE)
    one = replace(case, x=x, limit=1e30, routing=torch.ones(D, 1, device=DEVICE))
    check(one.with_stored((w1, s1, w3, s3, w2, s2)))


def test_a_token_alone_and_among_many_is_the_same() -> None:
    """Alone in the smallest tile; among many in the whole of the largest, and in its part."""
    many = tile_case(310)
    got = run(many)
    for t in (77, 308):
        assert_bits_equal(f"token {t}", run(many.rows(slice(t, t + 1)))[0], got[t])
    assert_bits_equal("forty", run(many.rows(slice(60, 100))), got[60:100])


def test_the_order_of_a_tokens_choices_changes_no_bit() -> None:
    case = MoeCase.random(2, 128, 128, 4, K=4, has_shared=False, device=DEVICE)
    rest = replace(case, shared=-run(case))  # what rounding took: its bits show the order of a sum
    turned = replace(rest, ids=case.ids.flip(1), routing=case.routing.flip(1))
    assert_bits_equal("turned", run(turned), run(rest))


def test_all_tokens_on_one_expert_and_repeated_ids() -> None:
    case = random_case(6, "nano")
    ids = case.ids.clone()
    ids[:, 0] = 3
    check(replace(case, ids=ids))  # 3 twice in some rows, most experts without a token
    check(replace(case, ids=torch.full_like(ids, 5)))


def test_a_part_of_the_experts_and_padding_rows() -> None:
    case = random_case(6, "nano")
    half = tuple(w[4:12].contiguous() for w in case.weights)
    ids = case.ids.clone()
    ids[3] = -1
    part = replace(case, ids=ids, weights=half, first_expert=4)
    got = check(part)
    assert case.shared is not None
    assert_bits_equal("padding row", got[3], case.shared[3])
    nobody = replace(part, ids=torch.full_like(ids, -1), shared=None)
    assert_bits_equal("nobody", run(nobody), torch.zeros_like(got))


def test_with_a_shared_expert() -> None:
    check(random_case(3, "nano", format="nvfp4"))


def test_large_activations_stay_finite() -> None:
    case = random_case(3, "nano")
    assert check(replace(case, x=(case.x * 1e4).clamp(-1e4, 1e4))).isfinite().all()


def test_nan_stays_with_its_token() -> None:
    case = random_case(3, "nano")
    want = run(case)
    x = case.x.clone()
    x[1, 7] = torch.nan
    got = run(replace(case, x=x))
    assert got[1].isnan().all()
    assert_bits_equal("neighbours", got[2:], want[2:])
    assert_bits_equal("neighbour", got[0], want[0])


def test_the_op_takes_it_for_more_tokens_than_decode() -> None:
    case = tile_case(65)
    assert select(ops.MOE_ROUTED, case.x.device) is grouped.SPEC
    assert_bits_equal("op", ops.moe_routed(**case.args()), run(case))
    assert run(case.rows(slice(0))).shape == (0, 256)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("T", [65, 1024, 8192])
def test_full_size(T: int, format: str) -> None:
    """Against the portable kernel, a few tokens against FP64, and bits alone and among many."""
    case = MoeCase.random(T, *FLASH, format=format, device="cuda")
    got = run(case)
    few = case.rows(slice(T - 5, T))
    exact = oracle.moe_routed(**few.wide().args())
    assert (got[-5:].double() - exact).norm() <= 3e-3 * exact.norm()
    assert_bits_equal("five", run(few), got[-5:])
    args = case.args()
    second = portable.outputs(**args)
    portable.launch(**args, out=second)
    assert (got.float() - second[0].float()).norm() <= 4e-3 * second[0].float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("T", [256, 1024, 4096, 8192])  # a tile each
def test_every_run_gives_the_same_bits(T: int, format: str) -> None:
    """Products that ran on into the next step read its registers, now and then."""
    case = MoeCase.random(T, *FLASH, format=format, device="cuda")
    want = run(case)
    for i in range(10):
        assert_bits_equal(f"run {i + 2}", run(case), want)


@pytest.mark.gpu
def test_a_graph_holds_it_and_routing_may_change() -> None:
    case = MoeCase.random(512, 1024, 512, 32, device="cuda")
    other = MoeCase.random(512, 1024, 512, 32, device="cuda", seed=1)
    static = replace(case, x=case.x.clone(), ids=case.ids.clone(), routing=case.routing.clone())
    run(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.moe_routed(**static.args())
    for now in (case, other, replace(case, ids=torch.full_like(case.ids, 7))):
        static.x.copy_(now.x), static.ids.copy_(now.ids), static.routing.copy_(now.routing)
        graph.replay()
        want = run(replace(static, x=now.x, ids=now.ids, routing=now.routing))
        assert_bits_equal("replay", got, want)
