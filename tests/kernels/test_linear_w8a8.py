"""linear_fp8_w8a8, whose input is FP8 already: the bits of linear_fp8 that rounds it."""

import pytest
import torch
from torch import Tensor

from dsv4.kernels.linear import linear_fp8_w8a8 as kernel
from dsv4.ops import linear as ops
from dsv4.ops.quant import fp8_act_quantize
from dsv4.reference import linear as oracle
from dsv4.reference.quant import fp8_act_dequantize
from dsv4.reference.quant import fp8_act_quantize as quantize_oracle
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.linear import fp8_tokens, fp8_weight, tokens
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

SHAPES = [(256, 512, 1), (256, 256, 2), (192, 128, 1), (128, 1536, 1)]
COUNTS = (1, 17, 64, 70)


@pytest.mark.parametrize("kind", ["F8_E8M0", "F32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_linear_fp8_that_rounds(shape: tuple[int, int, int], kind: str) -> None:
    N, K, groups = shape
    weight, scale = fp8_weight(N, K, kind, device=DEVICE)
    x = tokens(max(COUNTS), groups * K, device=DEVICE)
    values, x_scale = fp8_act_quantize(x)
    want = ops.linear_fp8(x, weight, scale, groups, True)
    for T in COUNTS:
        got = ops.linear_fp8_w8a8(values[:T], x_scale[:T], weight, scale, groups)
        assert_bits_equal(f"{T} tokens", got, want[:T])


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle(shape: tuple[int, int, int], T: int) -> None:
    """Every code but NaN, in the input too."""
    N, K, groups = shape
    weight, scale = fp8_weight(N, K, device=DEVICE)
    args = *fp8_tokens(T, groups * K, device=DEVICE), weight, scale, groups
    exact = oracle.linear_fp8(fp8_act_dequantize(*args[:2], torch.float64), *args[2:])
    got = ops.linear_fp8_w8a8(*args)
    assert_as_exact_as("y", got, oracle.linear_fp8_w8a8(*args), exact)
    assert (got.double() - exact).norm() <= 3e-3 * exact.norm()


def test_the_oracle_is_that_of_linear_fp8() -> None:
    weight, scale = fp8_weight(256, 256)
    x = tokens(5, 512)
    got = oracle.linear_fp8_w8a8(*quantize_oracle(x), weight, scale, 2)
    assert_bits_equal("y", got, oracle.linear_fp8(x, weight, scale, 2, True))


@pytest.mark.parametrize("T", [5, 70])
def test_a_scale_is_of_its_token_alone(T: int) -> None:
    weight, scale = fp8_weight(256, 256, device=DEVICE)
    values, x_scale = fp8_tokens(T, 256, device=DEVICE)
    want = ops.linear_fp8_w8a8(values, x_scale, weight, scale)
    byte = x_scale.view(torch.uint8)
    byte[1] += 30
    byte[3, 1] = 255  # NaN
    got = ops.linear_fp8_w8a8(values, x_scale, weight, scale)
    assert_bits_equal("larger", got[1], want[1] * 2.0**30)
    assert bool(got[3].isnan().all())
    others = [t for t in range(T) if t not in (1, 3)]
    assert_bits_equal("others", got[others], want[others])


@pytest.mark.parametrize("T", [3, 70])
def test_every_output_is_written(T: int) -> None:
    weight, scale = fp8_weight(256, 1536, device=DEVICE)
    args = *fp8_tokens(T, 1536, device=DEVICE), weight, scale, 1
    out = kernel.outputs(*args)
    y, partial, _, *staged = out  # the counters stay zero
    for x in (y, partial, *staged):
        x.view(torch.uint8).fill_(0xFF)
    kernel.launch(*args, out)
    assert_bits_equal("y", y, ops.linear_fp8_w8a8(*args))


def test_no_tokens_and_the_registered_op() -> None:
    weight, scale = fp8_weight(128, 256, device=DEVICE)
    none = ops.linear_fp8_w8a8(*fp8_tokens(0, 256, device=DEVICE), weight, scale)
    assert (none.shape, none.dtype) == ((0, 128), torch.bfloat16)
    args = *fp8_tokens(3, 256, device=DEVICE), weight, scale
    # Without "test_schema", which compares the inputs by arithmetic that FP8 does not have.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.linear_fp8_w8a8.op, args, test_utils=checks)


BAD = {
    "x": (lambda x: x.to(torch.bfloat16), "x: expected torch.float8_e4m3fn"),
    "x_scale": (lambda x: x.view(torch.uint8), "x_scale: expected torch.float8_e8m0fnu"),
    "weight": (lambda x: x.to(torch.bfloat16), "weight: expected torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("argument", BAD)
def test_a_bad_argument_is_named(argument: str) -> None:
    names = ("x", "x_scale", "weight", "scale")
    made = *fp8_tokens(3, 256, device=DEVICE), *fp8_weight(128, 256, device=DEVICE)
    args: dict[str, Tensor] = dict(zip(names, made, strict=True))
    change, message = BAD[argument]
    with pytest.raises(ValueError, match=message):
        ops.linear_fp8_w8a8(**args | {argument: change(args[argument])})
    few = args["x_scale"][:, 1:].contiguous()
    with pytest.raises(ValueError, match=r"x_scale: expected shape \[3, 2\], got \[3, 1\]"):
        ops.linear_fp8_w8a8(**args | {"x_scale": few})
    narrow = {"x": args["x"][:, :192].contiguous(), "weight": args["weight"][:, :192].contiguous()}
    with pytest.raises(ValueError, match="weight: expected columns in whole groups of 128"):
        ops.linear_fp8_w8a8(**args | narrow)
