"""Routed experts on tokens rounded to FP8, against their oracle and against no rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels.moe import moe_routed_w4a8, moe_routed_w4a8_sm100
from dsv4.ops import moe as ops
from dsv4.reference import experts as oracle
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.moe import MoeCase
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
IS_BLACKWELL = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 10
# Under the interpreter both run; on a device the one that is made for it.
KERNELS = [moe_routed_w4a8_sm100] if IS_BLACKWELL else [moe_routed_w4a8]
KERNELS += [moe_routed_w4a8_sm100] if DEVICE == "cpu" else []
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.SPEC.name)


def random_case(T: int, *shape: int, **options: Any) -> MoeCase:
    options = {"K": 2, "has_shared": False, "device": DEVICE} | options
    return MoeCase.random(T, *(shape or (256, 128, 16)), **options)


def run(kernel: ModuleType, case: MoeCase) -> Tensor:
    """The op; results and working memory start as NaN and as integers that are no index."""
    args = case.args_w4a8()
    out = kernel.outputs(**args)
    for x in out:
        is_fp8 = x.dtype == torch.float8_e4m3fn
        x.view(torch.uint8).fill_(0x7F) if is_fp8 else None
        if not is_fp8:
            x.fill_(torch.nan if x.is_floating_point() else -(2**30))
    kernel.launch(**args, out=out)
    return out[0]


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@kernels
@pytest.mark.parametrize("shape", [(256, 128, 16), (384, 256, 5)])
def test_it_equals_the_oracle(kernel: ModuleType, shape: tuple[int, ...]) -> None:
    """And costs the few percent that FP8 tokens cost, whoever computes them."""
    case = random_case(4, *shape)
    got = run(kernel, case)
    exact = oracle.moe_routed_w4a8(**case.wide().args_w4a8())
    assert_as_exact_as("w4a8", got, oracle.moe_routed_w4a8(**case.args_w4a8()), exact)
    unrounded = oracle.moe_routed(**case.wide().args())
    cost, least = distance(got, unrounded), distance(exact, unrounded)
    print(f"relative L2 error of FP8 tokens: {cost:.4f}, of the oracle in FP64 {least:.4f}")
    assert 0.03 < cost < min(0.06, 1.1 * least)


def exact_case(spread: int) -> MoeCase:
    """Tokens and hidden values that FP8 holds exactly; scales of a row up to 2^spread apart."""
    D, F = 128, 128
    case = random_case(D, D, F, 1, K=1)
    w1, s1, w3, s3, w2, s2 = (w.clone() for w in case.stored)
    w1.fill_(0x22), s1.fill_(141)  # gate 2^14: silu is the gate itself
    w3[:] = torch.arange(F * D // 2, device=DEVICE).to(torch.uint8).view(F, D // 2)
    s3[:] = 127 - torch.arange(D // 32, device=DEVICE).to(torch.uint8) * spread // (D // 32 - 1)
    w2.zero_(), s2.fill_(127)
    row = torch.arange(F, device=DEVICE)
    w2[:, row, row // 2] = torch.where(row % 2 == 0, 2, 32).to(torch.uint8)  # the identity
    x = torch.eye(D, dtype=torch.bfloat16, device=DEVICE)  # one-hot: single weights come back
    routing = torch.ones(D, 1, device=DEVICE)
    one = replace(case, x=x, limit=1e30, routing=routing)
    return one.with_stored((w1, s1, w3, s3, w2, s2))


@kernels
def test_every_code_is_exact_where_scales_of_a_row_are_close(kernel: ModuleType) -> None:
    case = exact_case(spread=11)
    assert_bits_equal("codes", run(kernel, case), oracle.moe_routed(**case.args()))


@kernels
def test_a_group_far_below_the_largest_scale_of_its_row_counts_as_zero(kernel: ModuleType) -> None:
    """Of 2^0, 2^-5, 2^-10 and 2^-15 the last; the native kernel has no such limit."""
    case = exact_case(spread=15)
    want = oracle.moe_routed(**case.args())
    if kernel is moe_routed_w4a8:
        want[96:] = 0  # the tokens that read columns of the last group
    assert_bits_equal("codes", run(kernel, case).abs(), want.abs())


@kernels
def test_a_token_alone_and_among_many_is_the_same(kernel: ModuleType) -> None:
    many = random_case(150, 128, 128, 1, K=1)
    got = run(kernel, many)
    for t in (0, 149):
        assert_bits_equal(f"token {t}", run(kernel, many.rows(slice(t, t + 1)))[0], got[t])


@kernels
def test_a_part_of_the_experts_shared_and_nan(kernel: ModuleType) -> None:
    case = random_case(4, has_shared=True)
    ids = case.ids.clone()
    ids[3] = -1
    part = replace(
        case, ids=ids, weights=tuple(w[4:12].contiguous() for w in case.weights), first_expert=4
    )
    got = run(kernel, part)
    exact = oracle.moe_routed_w4a8(**part.wide().args_w4a8())
    assert_as_exact_as("part", got, oracle.moe_routed_w4a8(**part.args_w4a8()), exact)
    assert case.shared is not None
    assert_bits_equal("padding row", got[3], case.shared[3])
    x = case.x.clone()
    x[1, 7] = torch.nan
    x[2] *= 1e4
    again = run(kernel, replace(part, x=x))
    assert again[1].isnan().any() or not bool(((ids[1] >= 4) & (ids[1] < 12)).any())
    assert again[2].isfinite().all()
    assert_bits_equal("neighbours", again[[0, 3]], got[[0, 3]])


def test_the_op() -> None:
    case = random_case(2, 128, 128, 2)
    assert_bits_equal("op", ops.moe_routed_w4a8(**case.args_w4a8()), run(KERNELS[0], case))
    assert ops.moe_routed_w4a8(**case.rows(slice(0)).args_w4a8()).shape == (0, 128)
    torch.library.opcheck(ops.moe_routed_w4a8.op, (), case.rows(slice(1)).args_w4a8())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("limit", lambda a: 0.0, "limit: expected a positive number"),
        ("s1", lambda a: a["s1"].repeat(1, 1, 1, 1, 2), "s1: expected shape"),  # that is NVFP4
    ],
)
def test_it_names_the_bad_argument(name: str, change: Callable, message: str) -> None:
    args = random_case(2).args_w4a8()
    with pytest.raises(ValueError, match=message):
        ops.moe_routed_w4a8(**args | {name: change(args)})


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 64, 1024, 8192])
def test_full_size(T: int) -> None:
    case = MoeCase.random(T, 4096, 2048, 256, has_shared=False, device="cuda")
    got = run(KERNELS[0], case)
    few = case.rows(slice(0, 3))
    exact = oracle.moe_routed_w4a8(**few.wide().args_w4a8())
    assert distance(got[:3][: len(exact)], exact) < 0.03
    assert distance(got[: len(exact)], oracle.moe_routed(**few.wide().args())) < 0.06
    assert_bits_equal("few", run(KERNELS[0], few), got[: len(exact)])
