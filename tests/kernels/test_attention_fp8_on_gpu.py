"""Attention that gives FP8 and the linear that takes it, at real sizes; graphs; both kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels.attention import sparse_attn_decode as decode_kernel
from dsv4.kernels.attention import sparse_attn_decode_sm90 as decode_sm90
from dsv4.kernels.linear import linear_fp8_w8a8, linear_fp8_w8a8_sm90
from dsv4.ops import attention as ops
from dsv4.ops import linear as linear_ops
from dsv4.ops.quant import fp8_act_quantize
from dsv4.testing.cases.attention import AttentionCase
from dsv4.testing.cases.linear import FLASH, PRO, tokens
from dsv4.testing.numeric import assert_bits_equal
from support.real_sizes import ATTENTION_KINDS, fp8_weight_on_gpu, launched

pytestmark = pytest.mark.gpu

TILE = 64
OPS = ("sparse_attn_decode", "sparse_attn_prefill")
WEIGHTS = {
    "flash-wo_a": FLASH["wo_a"], "pro-wo_a": PRO["wo_a"], "flash-wo_b": FLASH["wo_b"],
    "pro-wq_b": PRO["wq_b"],
}  # fmt: skip
COUNTS = (1, 2, 8, 9, 16, 17, 32, 33, 63, 64, 65, 128, 200)


@pytest.fixture(params=("first", "portable"))
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels that the device takes first, and those for any device."""
    if request.param == "portable":
        for name in ("SPARSE_ATTN_DECODE", "SPARSE_ATTN_PREFILL"):
            for form in (name, f"{name}_FP8"):
                monkeypatch.setattr(ops, form, getattr(ops, form)[-1:])
    return request.param


def assert_rounds(name: str, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Bit for bit what rounding the BF16 result gives; every output is written."""
    module = getattr(ops.kernels, f"{name}_fp8")
    out = module.outputs(**args)
    for x in out:
        x.view(torch.uint8).fill_(0xFF)
    kernel = ops.select(getattr(ops, f"{name}_fp8".upper()), args["q"].device)
    kernel.launch(**args, out=out)
    want = fp8_act_quantize(getattr(ops, name)(**args))
    for part, a, b in zip(("values", "scales"), out[:2], want, strict=True):
        assert_bits_equal(f"{name} {part}", a, b)
    return out[:2]


@pytest.mark.parametrize("H", [8, 16, 33, 64, 96, 128])
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_real_sizes(H: int, kind: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile a program, groups of tiles, and prefill."""
    requests = ((3000, 3), (0, 2), (127, 1), (700, 1))
    args = AttentionCase(requests, H, 512, 128, padding=1, **ATTENTION_KINDS[kind]).args("cuda")
    got = [assert_rounds(name, args) for name in OPS]
    monkeypatch.setattr(decode_kernel, "FEW_PROGRAMS", 0)
    got.append(assert_rounds("sparse_attn_decode", args))
    for other in got[1:]:
        for a, b in zip(got[0], other, strict=True):
            assert_bits_equal("programs", b, a)


@pytest.mark.parametrize("H", [8, 64, 96])
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_few_tokens(H: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters, whose warps find the scales, and two kernels: the same codes, of zeros too."""
    for requests in (((3000, 1),), ((3000, 1), (0, 1), (127, 1))):
        case = AttentionCase(requests, H, 512, 128, padding=1, **ATTENTION_KINDS[kind])
        args, ways, empty = case.args("cuda"), [], len(requests) // 2 + 1
        args["position"][-empty:] = -1  # padding, and the last of three
        for splits in ({4: 1}, {2: 1}, {}):
            monkeypatch.setattr(decode_sm90, "SPLITS", splits)
            ways.append(assert_rounds("sparse_attn_decode", args))
        ways.append(assert_rounds("sparse_attn_prefill", args))
        for other in ways[1:]:
            for a, b in zip(ways[0], other, strict=True):
                assert_bits_equal("ways", b, a)
        for name in OPS:
            kernel = getattr(ops.kernels, f"{name}_fp8")
            out = kernel.outputs(**args)
            kernel.launch(**args, out=out)
            for a, b in zip(ways[0], out[:2], strict=True):
                assert_bits_equal("no keys, by Triton", a[-empty:], b[-empty:])


@pytest.mark.parametrize("few", [0, 32])
def test_groups_of_tiles_are_combined(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_kernel, "FEW_PROGRAMS", few)
    args = AttentionCase(((34 * TILE, 1),), 64, 512, 128, 1, 64).args("cuda")
    assert_rounds("sparse_attn_decode", args)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("is_rotated", [False, True])
def test_many_tokens(name: str, is_rotated: bool, variant: str) -> None:
    case = AttentionCase([(3000, 300)], 70, 512, 128, topk=512, per_page=64, is_rotated=is_rotated)
    assert_rounds(name, case.args("cuda"))


@pytest.mark.parametrize("name", OPS)
def test_nan_is_in_the_scales_of_its_token_alone(name: str, variant: str) -> None:
    args = AttentionCase([(900, 1)] * 3, 64, 512, 128, topk=512, per_page=64).args("cuda")
    args["step"][3 * 576] = 0xFF  # the scale of the first token's own first group
    scale = assert_rounds(name, args)[1].view(torch.uint8)
    assert (scale[0] == 255).all()
    assert (scale[1:] < 255).all()


@pytest.mark.parametrize("B", [1, 40])
@pytest.mark.parametrize("name", OPS)
def test_a_graph_replays_the_bits_of_eager_calls(name: str, B: int, variant: str) -> None:
    """Attention and the projection behind it, which may start before attention is done."""
    first, second = (
        AttentionCase([(2000 + i, 1)] * B, 64, 512, 128, topk=512, per_page=64, seed=i).args("cuda")
        for i in range(2)
    )
    N, K, groups = FLASH["wo_a"]
    weight, scale = fp8_weight_on_gpu(N, K)

    def step(args: dict[str, Any]) -> Tensor:
        values, value_scale = getattr(ops, f"{name}_fp8")(**args)
        x = values.flatten(1), value_scale.flatten(1)
        return linear_ops.linear_fp8_w8a8(*x, weight, scale, groups)

    want = [
        linear_ops.linear_fp8(getattr(ops, name)(**args).flatten(1), weight, scale, groups, True)
        for args in (first, second)
    ]
    assert_bits_equal("eager", step(first), want[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(first)
    for k, x in second.items():
        if isinstance(x, Tensor):
            first[k].copy_(x)
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        assert_bits_equal("replay", out, want[1])


# The linear


@pytest.mark.parametrize("is_e8m0", [True, False], ids=["e8m0", "fp32"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_linear_equals_the_one_that_rounds(name: str, is_e8m0: bool) -> None:
    """In any batch; by the kernel for few tokens and by Triton's."""
    N, K, groups = WEIGHTS[name]
    weight, scale = fp8_weight_on_gpu(N, K)
    scale = scale if is_e8m0 else scale.float() * 1.3  # no power of two
    x = tokens(max(COUNTS), groups * K, device="cuda")
    x[5] *= 1e4 / x[5].abs().max()
    values, x_scale = fp8_act_quantize(x)
    every = linear_ops.linear_fp8(x, weight, scale, groups, True)
    is_hopper = torch.cuda.get_device_capability()[0] == 9
    for T in COUNTS:
        args = values[:T], x_scale[:T], weight, scale, groups
        assert_bits_equal(f"{T} tokens", linear_ops.linear_fp8_w8a8(*args), every[:T])
        assert_bits_equal(f"{T} by Triton", launched(linear_fp8_w8a8, *args), every[:T])
        if T <= 64 and is_hopper:
            assert_bits_equal(f"{T} by CUDA", launched(linear_fp8_w8a8_sm90, *args), every[:T])
    alone = values[50:51], x_scale[50:51], weight, scale, groups
    assert_bits_equal("alone", linear_ops.linear_fp8_w8a8(*alone), every[50:51])
