"""Routed experts against the oracle on the stored weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.core.errors import KernelUnavailable
from dsv4.core.expert_tiles import from_tiles
from dsv4.core.formats import BlockScaledTensor
from dsv4.kernels.moe import moe_routed as portable
from dsv4.kernels.moe import moe_routed_sm90
from dsv4.ops import moe as ops
from dsv4.reference import experts as oracle
from dsv4.reference.quant import dequantize, mxfp4_quantize, nvfp4_quantize
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.moe import MoeCase
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
KERNELS = [portable.SPEC] + ([moe_routed_sm90.SPEC] if DEVICE == "cuda" else [])
SHAPES = {"nano": (256, 128, 16), "odd": (384, 128, 7)}
if DEVICE == "cuda":
    SHAPES |= {"flash": (4096, 2048, 48), "pro": (7168, 3072, 24)}
MAX_TOKENS = 64 if DEVICE == "cuda" else 4
NUM_USED = 6 if DEVICE == "cuda" else 2  # experts of a token


def random_case(T: int, shape: str, **options: Any) -> MoeCase:
    return MoeCase.random(T, *SHAPES[shape], K=NUM_USED, device=DEVICE, **options)


def run(kernel: KernelSpec, case: MoeCase) -> Tensor:
    """The op with one kernel; results and working memory start as NaN."""
    args = case.args()
    out = portable.outputs(**args)
    for x in out:
        x.fill_(torch.nan)
    kernel.launch(**args, out=out)
    return out[0]


def check(kernel: KernelSpec, case: MoeCase) -> Tensor:
    got = run(kernel, case)
    same, exact = oracle.moe_routed(**case.args()), oracle.moe_routed(**case.wide().args())
    assert_as_exact_as("moe_routed", got, same, exact)
    return got


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_it_equals_the_oracle(kernel: KernelSpec, shape: str, format: str) -> None:
    for T in (1, 3, MAX_TOKENS) if DEVICE == "cuda" else (2,):
        case = random_case(T, shape, format=format, seed=T)
        got = check(kernel, case).double()
        exact = oracle.moe_routed(**case.wide().args())
        assert (got - exact).norm() / exact.norm() < 3e-3


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_every_code_and_scale_is_exact(kernel: KernelSpec) -> None:
    """One-hot tokens read single weights back, at the ends of the scales' range too."""
    D, F = 256, 128
    case = MoeCase.random(1, D, F, 1, K=1, has_shared=False, device=DEVICE)
    w1, s1, w3, s3, w2, s2 = (w.clone() for w in case.stored)
    w1.fill_(0x22), s1.fill_(127)  # gate 1 everywhere
    codes = torch.arange(F * D // 2, device=DEVICE).to(torch.uint8)
    w3[:] = codes.view(F, D // 2)
    w2.zero_(), s2.fill_(127)
    row = torch.arange(F, device=DEVICE)
    w2[:, row, row // 2] = torch.where(row % 2 == 0, 2, 32).to(torch.uint8)  # the identity
    for scale in (70, 126):
        s3.fill_(scale)
        for k in (0, 5, 255):
            x = torch.zeros(1, D, dtype=torch.bfloat16, device=DEVICE)
            x[:, k] = 1.0
            one = replace(case, x=x, limit=1e30, routing=torch.ones_like(case.routing))
            check(kernel, one.with_stored((w1, s1, w3, s3, w2, s2)))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_a_token_alone_and_among_many_is_the_same(kernel: KernelSpec) -> None:
    case = random_case(MAX_TOKENS, "odd")
    many = run(kernel, case)
    for t in (0, MAX_TOKENS // 2, MAX_TOKENS - 1):
        alone = run(kernel, case.rows(slice(t, t + 1)))
        assert_bits_equal(f"token {t}", alone[0], many[t])
    some = run(kernel, case.rows(slice(1, 4)))
    assert_bits_equal("three tokens", some, many[1:4])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_all_tokens_on_one_expert_and_repeated_ids(kernel: KernelSpec) -> None:
    case = random_case(MAX_TOKENS, "nano")
    ids = case.ids.clone()
    ids[:, 0] = 3
    check(kernel, replace(case, ids=ids))  # 3 twice in some rows
    check(kernel, replace(case, ids=torch.full_like(ids, 5)))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_a_part_of_the_experts_and_padding_rows(kernel: KernelSpec) -> None:
    case = random_case(4, "nano")
    half = tuple(w[4:12].contiguous() for w in case.weights)
    ids = case.ids.clone()
    ids[3] = -1
    part = replace(case, ids=ids, weights=half, first_expert=4)
    got = check(kernel, part)
    assert case.shared is not None
    assert_bits_equal("padding row", got[3], case.shared[3])
    nobody = replace(part, ids=torch.full_like(ids, -1), shared=None)
    assert_bits_equal("nobody", run(kernel, nobody), torch.zeros_like(got))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_large_activations_stay_finite(kernel: KernelSpec) -> None:
    case = random_case(2, "nano")
    big = replace(case, x=(case.x * 1e4).clamp(-1e4, 1e4))
    assert check(kernel, big).isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_nan_stays_with_its_token(kernel: KernelSpec) -> None:
    case = random_case(3, "nano")
    want = run(kernel, case)
    x = case.x.clone()
    x[1, 7] = torch.nan
    got = run(kernel, replace(case, x=x))
    assert got[1].isnan().all()
    assert_bits_equal("neighbours", got[::2], want[::2])


def test_no_token_is_legal() -> None:
    case = random_case(0, "nano")
    assert ops.moe_routed(**case.args()).shape == (0, 256)


def test_op_contract() -> None:
    case = random_case(2, "nano", format="nvfp4")
    torch.library.opcheck(ops.moe_routed.op, (), case.args())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("format", lambda a: "fp4", "format: expected one of mxfp4, nvfp4, got 'fp4'"),
        ("limit", lambda a: 0.0, "limit: expected a positive number"),
        ("first_expert", lambda a: -1, "first_expert: expected an integer >= 0"),
        ("global_scale", lambda a: a["routing"], "global_scale: expected None for mxfp4"),
        ("ids", lambda a: a["ids"].long(), "ids: expected torch.int32"),
        ("s2", lambda a: a["s2"][..., :2].contiguous(), "s2: expected shape"),
        ("w3", lambda a: a["w3"].transpose(0, 1), "w3: expected a contiguous tensor"),
        ("w1", lambda a: from_tiles(a["w1"]), "w1: expected shape"),
        ("shared", lambda a: a["shared"].float(), "shared: expected torch.bfloat16"),
    ],
)
def test_it_names_the_bad_argument(name: str, change: Callable, message: str) -> None:
    args = random_case(2, "nano").args()
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")):
        ops.moe_routed(**args | {name: change(args)})


def test_a_stack_in_tiles_gives_its_experts_back() -> None:
    g = torch.Generator().manual_seed(0)
    dense = [torch.randn(128, 256, generator=g) for _ in range(3)]
    for quantize in (mxfp4_quantize, nvfp4_quantize):
        weights = [quantize(w) for w in dense]
        codes, scales, global_scale = ops.stack_experts(weights)
        for e, w in enumerate(weights):
            one = None if global_scale is None else global_scale[e]
            data, scale = from_tiles(codes[e]), from_tiles(scales[e]).view(w.scale.dtype)
            back = BlockScaledTensor(w.format, data, scale, one)
            assert_bits_equal(f"expert {e}", dequantize(back), dequantize(w))


def test_stacking_refuses_scales_that_would_not_be_exact() -> None:
    w = mxfp4_quantize(torch.randn(128, 128) * 2.0**80)
    with pytest.raises(ValueError, match="scale bytes from 63 to 192, got"):
        ops.stack_experts([w])


def test_more_tokens_than_the_decode_kernel_takes_are_refused_by_name() -> None:
    case = random_case(65, "nano")
    with pytest.raises(KernelUnavailable, match="moe_routed/sm90: at most 64 tokens, got 65"):
        run(moe_routed_sm90.SPEC, case)


@pytest.mark.gpu
def test_weights_that_are_not_aligned_are_refused_by_name() -> None:
    args = random_case(2, "nano").args()
    room = torch.empty(args["w3"].numel() + 1, dtype=torch.uint8, device="cuda")
    w3 = room[1:].view(args["w3"].shape).copy_(args["w3"])
    with pytest.raises(ValueError, match="w3: expected an address that is a multiple of 16"):
        ops.moe_routed(**args | {"w3": w3})


@pytest.mark.gpu
def test_a_graph_replays_and_leaves_its_counters_zero() -> None:
    case = MoeCase.random(8, 4096, 2048, 32, device="cuda")
    other = MoeCase.random(8, 4096, 2048, 32, device="cuda", seed=1)
    want = ops.moe_routed(**case.args()), ops.moe_routed(**other.args())
    x, ids, routing = case.x.clone(), case.ids.clone(), case.routing.clone()
    static = replace(case, x=x, ids=ids, routing=routing)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.moe_routed(**static.args())
    for step in range(20):
        now = (case, other)[step % 2]
        x.copy_(now.x), ids.copy_(now.ids), routing.copy_(now.routing)
        expected = ops.moe_routed(**replace(case, x=x, ids=ids, routing=routing).args())
        graph.replay()
        assert_bits_equal(f"step {step}", got, expected)
    assert_bits_equal("eager", ops.moe_routed(**other.args()), want[1])
