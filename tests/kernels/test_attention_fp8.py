"""Attention that gives FP8: the bits of rounding its BF16 result, and what wo_a makes of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels.attention import sparse_attn_decode as decode_kernel
from dsv4.ops import attention as ops
from dsv4.ops.linear import linear_fp8, linear_fp8_w8a8
from dsv4.ops.quant import fp8_act_quantize
from dsv4.reference import paged_attention as oracle
from dsv4.reference.quant import fp8_act_dequantize
from dsv4.reference.quant import fp8_act_quantize as quantize_oracle
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.attention import POISON, AttentionCase
from dsv4.testing.cases.linear import fp8_weight
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

# The interpreter warns where a sink overflows next to no keys at all.
pytestmark = [pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")]
pytestmark += [pytest.mark.gpu] if DEVICE == "cuda" else []

OPS = ("sparse_attn_decode", "sparse_attn_prefill")
MIXED = ((37, 1), (0, 2), (100, 1))
KINDS = {
    "csa": {"topk": 24, "ratio": 4, "per_page": 8},
    "hca": {"ratio": 16, "per_page": 2},
    "swa": {"ratio": 4096, "per_page": 1},
}


def run(name: str, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return getattr(ops, f"{name}_fp8")(**args)


def assert_rounds(name: str, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Bit for bit what rounding the BF16 result gives; -> values and scales."""
    got = run(name, args)
    want = fp8_act_quantize(getattr(ops, name)(**args))
    for part, a, b in zip(("values", "scales"), got, want, strict=True):
        assert_bits_equal(f"{name} {part}", a, b)
    return got


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_bf16_result_rounded(name: str, kind: str) -> None:
    args = AttentionCase(MIXED, padding=1, **KINDS[kind]).args(DEVICE)
    values, scale = assert_rounds(name, args)
    assert (values[-1].float() == 0).all()  # padding
    assert len(scale.view(torch.uint8).unique()) > 1


@pytest.mark.parametrize("C", [128, 256, 384, 512])
@pytest.mark.parametrize("name", OPS)
def test_head_dims(name: str, C: int) -> None:
    """A scale a piece of 128 dims; only the last piece is rotated."""
    args = AttentionCase(((40, 1), (3, 1)), 24, C, topk=6).args(DEVICE)
    assert assert_rounds(name, args)[1].shape == (2, 24, C // 128)


@pytest.mark.parametrize("H", [1, 40])
def test_heads(H: int) -> None:
    for name in OPS:
        assert_rounds(name, AttentionCase(((70, 1),), H, topk=9, is_rotated=False).args(DEVICE))


def test_programs_of_one_tile_and_of_many_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    args = AttentionCase(((150, 1), (9, 1)), rows=70, ratio=1, per_page=4).args(DEVICE)
    got = []
    for few in (0, 1000):
        monkeypatch.setattr(decode_kernel, "FEW_PROGRAMS", few)
        shared = ops.kernels.sparse_attn_decode_fp8.outputs(**args)[2]
        assert (shared.numel() > 0) == (few > 0)
        got.append(assert_rounds("sparse_attn_decode", args))
    got.append(run("sparse_attn_prefill", args))
    for other in got[1:]:
        for a, b in zip(got[0], other, strict=True):
            assert_bits_equal("programs", b, a)


@pytest.mark.parametrize("name", OPS)
def test_is_as_exact_as_the_oracle(name: str) -> None:
    args = AttentionCase(MIXED, padding=1, topk=9).args(DEVICE)
    got = fp8_act_dequantize(*(x.cpu() for x in run(name, args)))
    args = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in args.items()}
    same = fp8_act_dequantize(*getattr(oracle, f"{name}_fp8")(**args))
    exact = getattr(oracle, name)(**args | {"q": args["q"].double()})
    assert_as_exact_as(name, got, same, exact)
    error = (got - exact).norm() / exact.norm()
    assert 0.01 < error < 0.04  # 3 mantissa bits


@pytest.mark.parametrize("name", OPS)
def test_the_oracle_is_the_result_rounded(name: str) -> None:
    args = AttentionCase(MIXED, padding=1, topk=9).args()
    got = getattr(oracle, f"{name}_fp8")(**args)
    for a, b in zip(got, quantize_oracle(getattr(oracle, name)(**args)), strict=True):
        assert_bits_equal("oracle", a, b)


@pytest.mark.parametrize("name", OPS)
def test_nan_is_in_the_scales_of_its_token_alone(name: str) -> None:
    args = AttentionCase(((20, 1), (30, 1)), C=256, topk=2).args(DEVICE)
    args["step"][2 * 320] = POISON  # the scale of the first token's own first group
    scale = assert_rounds(name, args)[1].view(torch.uint8)
    assert (scale[0] == 255).all()
    assert (scale[1] < 255).all()


@pytest.mark.parametrize("name", OPS)
def test_results_of_every_size(name: str) -> None:
    """Nothing at all, which has the least scale, and numbers that differ by 2^30 between heads."""
    args = AttentionCase(((60, 1),), topk=8).args(DEVICE)
    for sink in (float("inf"), float("-inf")):
        assert_rounds(name, args | {"sink": torch.full_like(args["sink"], sink)})
    rising = torch.arange(16, device=DEVICE) * 3.0  # weights of the keys fall by e^3 a head
    scale = assert_rounds(name, args | {"sink": rising})[1].view(torch.uint8)[0, :, 0].int()
    assert scale.max() - scale.min() > 6
    assert_rounds(name, args | {"position": args["position"] * 0 - 1})


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("rows", [16, 70])
def test_every_output_is_written(name: str, rows: int) -> None:
    """Results and partial results start as NaN."""
    module = getattr(ops.kernels, f"{name}_fp8")
    args = AttentionCase(MIXED[:2], 8, rows=rows, topk=24, padding=1).args(DEVICE)
    out = module.outputs(**args)
    for x in out:
        x.view(torch.uint8).fill_(0xFF)
    module.launch(**args, out=out)
    for got, want in zip(out[:2], run(name, args), strict=True):
        assert_bits_equal("out", got, want)
    assert not (out[1].view(torch.uint8) == 0xFF).any()


@pytest.mark.parametrize("name", OPS)
def test_wo_a_takes_it_as_it_is(name: str) -> None:
    """The projection of FP8 attention is that of BF16 attention with its input rounded."""
    H, C, groups = 8, 128, 2
    args = AttentionCase(MIXED, H, C, topk=8).args(DEVICE)
    weight, scale = fp8_weight(64 * groups, H * C // groups, device=DEVICE)
    values, value_scale = run(name, args)
    got = linear_fp8_w8a8(values.flatten(1), value_scale.flatten(1), weight, scale, groups)
    x = getattr(ops, name)(**args).flatten(1)
    assert_bits_equal("y", got, linear_fp8(x, weight, scale, groups, True))
    assert not torch.equal(got, linear_fp8(x, weight, scale, groups))


# Nothing to do, the registered op, bad arguments


@pytest.mark.parametrize("name", OPS)
def test_no_tokens(name: str) -> None:
    values, scale = run(name, AttentionCase((), C=256, topk=4).args(DEVICE))
    assert (values.shape, scale.shape) == ((0, 16, 256), (0, 16, 2))


@pytest.mark.parametrize("name", OPS)
def test_op_contract(name: str) -> None:
    args = AttentionCase(((20, 1),), topk=8).args(DEVICE)
    # Without "test_schema", which compares by arithmetic that FP8 does not have.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(ops, f"{name}_fp8").op, (), args, test_utils=checks)


@pytest.mark.parametrize("name", OPS)
def test_a_bad_argument_is_named(name: str) -> None:
    module = getattr(ops.kernels, f"{name}_fp8")
    args = AttentionCase(((20, 1),), topk=8).args(DEVICE)
    values, scale, *shared = module.outputs(**args)
    for out, message in (
        ((values.to(torch.bfloat16), scale), "out: expected torch.float8_e4m3fn"),
        ((values, scale.view(torch.uint8)), "out_scale: expected torch.float8_e8m0fnu"),
        ((values, scale[:, 1:].contiguous()), "out_scale: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            module.launch(**args, out=(*out, *shared))
    with pytest.raises(ValueError, match="sink: expected"):
        run(name, args | {"sink": args["sink"][1:]})
