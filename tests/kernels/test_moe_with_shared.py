"""Routed and shared experts in one launch: the bits of the four launches that they are else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.core.errors import KernelUnavailable
from dsv4.kernels.common import cuda
from dsv4.kernels.moe import moe_with_shared_sm90 as kernel
from dsv4.ops import moe as ops
from dsv4.ops.activation import gate_up_swiglu
from dsv4.ops.linear import linear_fp8, wide_linear
from dsv4.ops.norm import rms_norm
from dsv4.ops.router import router_hash, router_topk
from dsv4.reference import experts as oracle
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.moe import MoeCase
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
ON_GPU = DEVICE == "cuda"
SHAPES = {"nano": (256, 128, 16)}  # the kernel does not take it: its parts run
if ON_GPU:
    SHAPES |= {"small": (512, 512, 7), "long": (2048, 512, 5), "wide": (512, 1024, 5),
               "flash": (4096, 2048, 160), "pro": (7168, 3072, 24)}  # fmt: skip
TAKEN = [name for name in SHAPES if name != "nano"]
K = 6 if ON_GPU else 2


def made(T: int, shape: str = "nano", **options: Any) -> MoeCase:
    D, F, E = SHAPES[shape]
    return MoeCase.random(T, D, F, E, K=min(K, E), has_shared=False, device=DEVICE, **options)


def parts(args: dict[str, Any]) -> Tensor:
    """What the one launch stands for."""
    names = ("gate_up", "gate_up_scale", "down", "down_scale")
    gate_up, gate_up_scale, down, down_scale = (args[name] for name in names)
    hidden = gate_up_swiglu(linear_fp8(args["x"], gate_up, gate_up_scale), args["limit"])
    rest = {k: v for k, v in args.items() if k not in (*names, "after_router")}
    return ops.moe_routed(**rest, shared=linear_fp8(hidden, down, down_scale))


def run(args: dict[str, Any]) -> Tensor:
    """The kernel itself, with working memory of NaN."""
    out = kernel.outputs(**args)
    for x in out:
        x.fill_(torch.nan)
    kernel.launch(**args, out=out)
    return out[0]


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", [1, 2])
def test_it_equals_the_oracle(T: int, shape: str, format: str) -> None:
    case = made(T, shape, format=format)
    args = case.args_with_shared()
    got, same = ops.moe_with_shared(**args), oracle.moe_with_shared(**args)
    exact = oracle.moe_with_shared(**args | {"x": case.x.double()})
    assert_as_exact_as("moe_with_shared", got, same, exact)


@pytest.mark.parametrize("scale", ["F8_E8M0", "F32"])
def test_it_has_the_bits_of_its_parts(scale: str) -> None:
    """Of sizes that the kernel takes; on a CPU the device alone is why it does not."""
    for T in (1, 3):
        args = MoeCase.random(T, 512, 512, 4, K=2, has_shared=False, device=DEVICE)
        args = args.args_with_shared(scale)
        names = ("x", "gate_up", "gate_up_scale", "down_scale")
        assert (kernel.why_not(*(args[name] for name in names)) is None) == (T == 1)
        assert_bits_equal("parts", ops.moe_with_shared(**args), parts(args))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", TAKEN)
def test_the_op_takes_the_kernel_for_one_token(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts have the same bits: they would tell nothing."""
    seen = []

    def watched(*args: Any) -> None:
        seen.append(args[0].shape[0])
        kernel.launch(*args)

    monkeypatch.setattr(ops, "MOE_WITH_SHARED", replace(kernel.SPEC, launch=watched))
    for T in (2, 1):
        for scale in ("F8_E8M0", "F32"):
            ops.moe_with_shared(**made(T, shape).args_with_shared(scale))
    assert seen == [1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("more", [1, 7, 40])
def test_few_blocks_for_the_routed_experts(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has many units, of all experts."""
    args = made(1, "flash").args_with_shared()
    want = parts(args)
    monkeypatch.setattr(cuda.Kernel, "resident_blocks", lambda self, threads: 128 + more)
    assert_bits_equal("parts", run(args), want)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", ["F8_E8M0", "F32"])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", TAKEN)
def test_the_kernel_has_the_bits_of_its_parts(shape: str, format: str, scale: str) -> None:
    for seed in range(4):
        args = made(1, shape, format=format, seed=seed).args_with_shared(scale)
        assert_bits_equal(f"seed {seed}", run(args), parts(args))


@pytest.mark.gpu
def test_the_kernel_at_the_ends_of_the_numbers() -> None:
    """Beyond the limit either way, beyond BF16's range, NaN: what the parts give."""
    for factor in (1e2, 1e4, 1e30, float("nan")):
        case = made(1, "small")
        x = case.x.clone()
        x[0, ::3] *= -factor
        args = replace(case, x=x).args_with_shared()
        got, want = run(args), parts(args)
        assert torch.equal(got.isnan(), want.isnan())
        assert_bits_equal(f"x {factor}", got.nan_to_num(0.0), want.nan_to_num(0.0))


@pytest.mark.gpu
def test_the_kernel_with_few_routed_experts() -> None:
    """A padding row, other devices' experts, the same expert more than once."""
    case = made(1, "flash")
    nobody, twice = torch.full_like(case.ids, -1), case.ids.clone()
    twice[0, 1] = twice[0, 4] = twice[0, 0]
    for ids, first in ((nobody, 0), (twice, 0), (case.ids, 100), (torch.full_like(twice, 5), 0)):
        args = replace(case, ids=ids, first_expert=first).args_with_shared()
        assert_bits_equal("parts", run(args), parts(args))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "format"), [("flash", "mxfp4"), ("pro", "mxfp4"), ("flash", "nvfp4")]
)
def test_replays_behind_routers_leave_the_counters_zero(shape: str, format: str) -> None:
    """As in a step: norm, gate, router, experts, each started while the one before runs."""
    case = made(1, shape, format=format)
    D, _, E = SHAPES[shape]
    g = torch.Generator("cuda").manual_seed(0)
    gates = torch.randn(6, E, D, generator=g, device="cuda").mul(D**-0.5).bfloat16()
    bias, norm = torch.zeros(E, device="cuda"), torch.ones(D, device="cuda")
    hashed = torch.rand(50, E, generator=g, device="cuda").topk(K, dim=1).indices.to(torch.int32)
    word = torch.zeros(1, dtype=torch.int64, device="cuda")
    args = case.args_with_shared()

    def layers(experts: Callable) -> list[Tensor]:
        x, seen = static, []
        for i, gate in enumerate(gates):
            logits = wide_linear(y := rms_norm(x, norm, 1e-6), gate)
            by_hash = i % 3 == 2
            ids, routing = (
                router_hash(logits, hashed, word, 1.5) if by_hash
                else router_topk(logits, bias, K, 1.5)
            )  # fmt: skip
            x = experts(y, ids, routing)
            seen.append(x)
        return seen

    def whole(x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        now = {"x": x, "ids": ids, "routing": routing, "after_router": True}
        return ops.moe_with_shared(**args | now)

    def apart(x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        return parts(args | {"x": x, "ids": ids, "routing": routing})

    static = case.x.clone()
    layers(whole)  # loads the kernels, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = layers(whole)
    for _ in range(100):
        static.copy_(torch.randn(1, D, generator=g, device="cuda"))
        word.random_(0, 50, generator=g)
        want = layers(apart)
        graph.replay()
        for layer, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_bits_equal(f"layer {layer}", a, b)


def test_no_token_is_legal() -> None:
    assert ops.moe_with_shared(**made(0).args_with_shared()).shape == (0, 256)


def test_op_contract() -> None:
    args = made(2).args_with_shared()
    # Without "test_schema", which compares the inputs by arithmetic that FP8 does not have.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.moe_with_shared.op, (), args, test_utils=checks)


def test_what_it_takes() -> None:
    assert kernel.plan(4096, 2048) == {
        "SHARED_BLOCKS": 128, "UP_CHUNK": 4, "DOWN_CHUNK": 2, "SUMS_BYTES": 4096
    }  # fmt: skip
    assert kernel.plan(7168, 3072) == {
        "SHARED_BLOCKS": 192, "UP_CHUNK": 7, "DOWN_CHUNK": 6, "SUMS_BYTES": 4096
    }  # fmt: skip
    assert kernel.plan(256, 128) is None
    assert kernel.plan(65536, 2048) is None  # a token does not fit
    for D, F in ((2048, 3584), (2560, 3584), (2560, 2048), (512, 256)):
        assert kernel.plan(D, F) is None, (D, F)
    x, up, scale = torch.empty(1, 4096), torch.empty(4096, 1), torch.empty(1)
    assert kernel.why_not(x, up, scale, scale) is None
    for args, why in (
        ((x[:0], up, scale, scale), "x: expected one token, got 0"),
        ((x.expand(2, -1), up, scale, scale), "x: expected one token, got 2"),
        ((x, up, scale, scale.to(torch.float8_e8m0fnu)), "down_scale: expected torch.float32"),
        ((x[:, :256], up, scale, scale), "gate_up: expected columns that have halves"),
    ):
        assert why in (kernel.why_not(*args) or "")


@pytest.mark.gpu
def test_a_device_too_small_is_a_reason_for_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    args = made(1, "flash").args_with_shared()
    names = ("x", "gate_up", "gate_up_scale", "down_scale")
    few = SimpleNamespace(multi_processor_count=16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: few)
    why = kernel.why_not(*(args[name] for name in names))
    assert why == "x: expected a device that holds 256 blocks at once, this one: 64"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "gate_up",
            lambda a: a["gate_up"][:, 16:].contiguous(),
            r"gate_up: expected shape \[256 256\]",
        ),
        ("gate_up", lambda a: a["gate_up"][1:], r"gate_up: expected shape \[256 256\]"),
        ("w1", lambda a: a["w1"][0, 0], "w1: expected shape"),
        ("down", lambda a: a["down"].view(torch.uint8), "down: expected torch.float8_e4m3fn"),
        ("down_scale", lambda a: a["down_scale"].half(), "down_scale: expected torch.float8"),
        (
            "gate_up_scale",
            lambda a: a["gate_up_scale"].repeat(1, 2)[:, ::2],
            "gate_up_scale: expected a contiguous tensor",
        ),
        ("limit", lambda a: 0.0, r"limit: expected a (positive number|number above 0)"),
        ("ids", lambda a: a["ids"].long(), "ids: expected torch.int32"),
    ],
)
@pytest.mark.parametrize("whole", [run, lambda args: ops.moe_with_shared(**args)])
def test_the_bad_argument_is_named(
    whole: Callable, name: str, change: Callable, message: str
) -> None:
    args = made(2).args_with_shared()
    with pytest.raises(ValueError, match=message):
        whole(args | {name: change(args)})


def test_what_the_kernel_does_not_take_is_refused_by_name() -> None:
    args = made(2).args_with_shared()
    why = "moe_with_shared/sm90: x: expected one token, got 2: call torch.ops"
    with pytest.raises(KernelUnavailable, match=why):
        run(args)


def test_a_device_must_hold_the_shared_expert_and_more() -> None:
    """Else no block would have routed experts, and those that are there would wait for ever."""
    assert kernel.num_blocks(660, 128, 384) == 512
    assert kernel.num_blocks(528, 192, 672) == 528
    assert kernel.num_blocks(129, 128, 384) == 129
    for resident in (128, 64):
        with pytest.raises(KernelUnavailable, match=f"more than the 128 blocks .* got {resident}:"):
            kernel.num_blocks(resident, 128, 384)
