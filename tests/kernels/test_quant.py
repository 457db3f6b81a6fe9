"""dsv4.kernels.quant against the oracles, byte for byte."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.core.formats import FP8_BLOCK128, BlockScaledTensor
from dsv4.kernels import quant as kernels
from dsv4.ops import quant as ops
from dsv4.reference import fused, quant
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.norm import vectors
from dsv4.testing.cases.quant import any_number, quant_calls
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

BF16, FP32 = torch.bfloat16, torch.float32
FLOATS = [BF16, FP32]
SIZES = [(3, 4096), (2, 7168), (1, 1024), (5, 128), (2, 3, 256), (384,)]


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def assert_same(got: Any, want: Any) -> None:
    got, want = as_tuple(got), as_tuple(want)
    assert len(got) == len(want)
    for i, pair in enumerate(zip(got, want, strict=True)):
        assert_bits_equal(f"result {i}", *pair)


def parts(t: BlockScaledTensor) -> tuple[Tensor, Tensor]:
    return t.data, t.scale


# There: activations


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ["fp8_act_quantize", "mxfp4_act_quantize"])
@pytest.mark.parametrize("shape", SIZES)
def test_activations_equal_the_oracle(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = vectors(*shape, dtype=dtype)
    assert_same(getattr(ops, op)(x.to(DEVICE)), getattr(quant, op)(x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("op", "group"),
    [("fp8_act_quantize", 64), ("fp8_act_quantize", 16), ("mxfp4_act_quantize", 32),
     ("mxfp4_act_quantize", 16)],
)  # fmt: skip
def test_any_number_equals_the_oracle(op: str, group: int, dtype: torch.dtype) -> None:
    x = any_number(1 << 16, dtype, group)
    assert_same(getattr(ops, op)(x.to(DEVICE), group), getattr(quant, op)(x, group))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SIZES)
def test_nvfp4_equals_the_oracle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = vectors(*shape, dtype=dtype)
    want = fused.nvfp4_act_quantize(x)
    assert_same(ops.nvfp4_act_quantize(x.to(DEVICE)), want)
    share = torch.tensor(0.00317)
    want = fused.nvfp4_act_quantize(x, share)
    assert_same(ops.nvfp4_act_quantize(x.to(DEVICE), share.to(DEVICE)), want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nvfp4_of_any_number_equals_the_oracle(dtype: torch.dtype) -> None:
    x = any_number(1 << 16, dtype)
    for share in (1.0, 3e-7, 2.0**60, 1e-38):
        share = torch.tensor(share)
        want = fused.nvfp4_act_quantize(x, share)
        assert_same(ops.nvfp4_act_quantize(x.to(DEVICE), share.to(DEVICE)), want)


def test_nvfp4_oracle_is_the_one_of_weights() -> None:
    w = vectors(6, 64)
    packed, scale, share = fused.nvfp4_act_quantize(w)
    want = quant.nvfp4_quantize(w)
    assert want.global_scale is not None
    assert_same((packed, scale, share), (want.data, want.scale, want.global_scale))
    back = fused.nvfp4_act_dequantize(packed, scale, share)
    assert_bits_equal("back", back, quant.dequantize(want))


def test_nvfp4_amax_is_found_wherever_it_is() -> None:
    """In the first or last program, past the last whole tile; of zeros the scale is one."""
    for at in (0, 4095, 4096, 12287, 12300, 12335):
        x = torch.full((771, 16), 0.25).flatten()
        x[at] = -5.0
        got = ops.nvfp4_act_quantize(x.view(771, 16).to(DEVICE))[2]
        assert got.item() == torch.tensor(5 / 2688, dtype=FP32).item()
    assert ops.nvfp4_act_quantize(torch.zeros(3, 64, device=DEVICE))[2].item() == 1


def test_nvfp4_amax_of_more_tiles_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernels.nvfp4_act_quantize
    monkeypatch.setitem(kernel.AMAX_CONFIG, "TILE", 32)
    monkeypatch.setattr(kernel, "MAX_PARTS", 4)
    for at in (0, 32 * 4, 32 * 10 - 17, 32 * 10 - 1):
        x = torch.full((32 * 10 - 16 * (at % 2 == 0),), 0.25)
        x[at] = -5.0
        assert_same(ops.nvfp4_act_quantize(x.to(DEVICE)), fused.nvfp4_act_quantize(x))


@pytest.mark.parametrize("op", ["fp8_act_quantize", "mxfp4_act_quantize", "nvfp4_act_quantize"])
def test_a_group_with_nan_or_infinity_is_marked_and_alone(op: str) -> None:
    x = vectors(1, 1024)
    spoilt = x.clone()
    spoilt[0, 200], spoilt[0, 700] = torch.nan, torch.inf
    share = () if op != "nvfp4_act_quantize" else (torch.tensor(1.0, device=DEVICE),)
    clean, got = (getattr(ops, op)(y.to(DEVICE), *share) for y in (x, spoilt))
    oracle = fused if share else quant
    want = getattr(oracle, op)(spoilt, *(s.cpu() for s in share))
    assert_bits_equal("scale", got[1], want[1])
    back = getattr(ops, op.replace("quantize", "dequantize"))
    values = back(*got[: 3 if share else 2]).flatten()
    group = 1024 // got[1].shape[-1]
    assert values[200 // group * group :][:group].isnan().all()
    same = torch.ones(1024, dtype=torch.bool)
    for at in (200, 700):
        same[at // group * group :][:group] = False
    assert_bits_equal("others", values.cpu()[same], back(*clean).flatten().cpu()[same])
    if not share:
        assert values[700 // group * group :][:group].isnan().all()


# There: weights


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (1, 5), (129, 128), (128, 257)])
def test_weights_equal_the_oracle(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = vectors(*shape, dtype=dtype)
    got = ops.fp8_block_quantize(w.to(DEVICE))
    assert_same(got, parts(quant.fp8_block_quantize(w)))
    for out in FLOATS:
        want = quant.dequantize(BlockScaledTensor(FP8_BLOCK128, *(x.cpu() for x in got)), out)
        assert_bits_equal("back", ops.fp8_block_dequantize(*got, out), want)


def test_a_weight_block_with_nan_is_marked_and_alone() -> None:
    w = vectors(200, 300, device=DEVICE)
    clean = ops.fp8_block_quantize(w)
    w[130, 5] = torch.nan
    data, scale = ops.fp8_block_quantize(w)
    assert scale.view(torch.uint8)[1, 0] == 255
    values = ops.fp8_block_dequantize(data, scale)
    assert values[128:, :128].isnan().all()
    values[128:, :128] = 0
    want = ops.fp8_block_dequantize(*clean)
    want[128:, :128] = 0
    assert_bits_equal("others", values, want)


# And back


def codes(*shape: int) -> Tensor:
    """Every byte, in no order."""
    g = torch.Generator().manual_seed(5)
    count = torch.Size(shape).numel()
    return (torch.randperm(count, generator=g) % 256).to(torch.uint8).view(shape)


def assert_same_numbers(got: Tensor, want: Tensor) -> None:
    """Equal bits, and NaN in the same places."""
    nan = want.isnan()
    assert_bits_equal("is NaN", got.isnan(), nan)
    assert_bits_equal("numbers", got.cpu().masked_fill(nan, 0), want.masked_fill(nan, 0))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [128, 64, 8])
def test_fp8_codes_read_as_the_oracle_says(group: int, dtype: torch.dtype) -> None:
    data = codes(64, 1024).view(torch.float8_e4m3fn)
    scale = codes(64, 1024 // group).view(torch.float8_e8m0fnu)
    got = ops.fp8_act_dequantize(data.to(DEVICE), scale.to(DEVICE), dtype)
    assert_same_numbers(got, quant.fp8_act_dequantize(data, scale, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [32, 16])
@pytest.mark.parametrize("stored", [torch.uint8, torch.int8])
def test_mxfp4_codes_read_as_the_oracle_says(
    stored: torch.dtype, group: int, dtype: torch.dtype
) -> None:
    packed, scale = codes(64, 512).view(stored), codes(64, 1024 // group)
    scale = scale.view(torch.float8_e8m0fnu)
    got = ops.mxfp4_act_dequantize(packed.to(DEVICE), scale.to(DEVICE), dtype)
    assert_same_numbers(got, quant.mxfp4_act_dequantize(packed, scale, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share", [1.0, 0.0123, 3e-40])
def test_nvfp4_codes_read_as_the_oracle_says(share: float, dtype: torch.dtype) -> None:
    packed, scale = codes(64, 512), codes(64, 64).view(torch.float8_e4m3fn)
    args = packed, scale, torch.tensor(share)
    got = ops.nvfp4_act_dequantize(*(x.to(DEVICE) for x in args), dtype)
    assert_same_numbers(got, fused.nvfp4_act_dequantize(*args, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_weight_codes_read_as_the_oracle_says(dtype: torch.dtype) -> None:
    data = codes(200, 300).view(torch.float8_e4m3fn)
    for scale in (codes(2, 3).view(torch.float8_e8m0fnu), torch.rand(2, 3) + 0.01):
        got = ops.fp8_block_dequantize(data.to(DEVICE), scale.to(DEVICE), dtype)
        assert_same_numbers(got, fused.fp8_block_dequantize(data, scale, dtype))


# Bias


E4M3 = [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("op", ["fp8_act_quantize", "mxfp4_act_quantize", "nvfp4_act_quantize"])
def test_rounding_has_no_bias(op: str, sign: int) -> None:
    """Between two codes, drawn evenly, the mean error is 0 gaps; at their midpoints exactly 0.

    Truncation would show as half a gap, ties away from zero as half a gap at the midpoints.
    """
    table = torch.tensor(E4M3 if op.startswith("fp8") else E2M1)
    group = {"fp8_act_quantize": 128, "mxfp4_act_quantize": 32}.get(op, 16)
    pairs = 2 * ((len(table) - 1) // 2)  # an even number of gaps: ties go up as often as down
    n, g = 1 << 16, torch.Generator().manual_seed(1)
    for is_tie in (False, True):
        gap_of = torch.arange(n) % pairs
        low, high = table[gap_of], table[gap_of + 1]
        u = torch.full((n,), 0.5) if is_tie else torch.rand(n, generator=g)
        x = (low + u * (high - low)).view(-1, group - 1 if n % (group - 1) == 0 else 1)
        x = x.flatten()[: n // (group - 1) * (group - 1)].view(-1, group - 1)
        top = torch.full((len(x), 1), float(table[-1]))  # makes the scale 1
        y = sign * torch.cat((x, top), dim=1)
        share = () if op != "nvfp4_act_quantize" else (torch.tensor(1.0, device=DEVICE),)
        made = getattr(ops, op)(y.to(DEVICE), *(share or (group,)))
        back = getattr(ops, op.replace("quantize", "dequantize"))(*made)
        used = x.numel() // pairs * pairs
        gaps = (high - low)[:used]
        error = ((back.cpu() - y)[:, :-1].flatten()[:used] / gaps).double()
        limit = 0 if is_tie else 5 * 12**-0.5 / used**0.5
        assert abs(error.mean().item()) <= limit
        assert error.abs().max() <= 0.5


@pytest.mark.parametrize("dtype", FLOATS)
def test_there_and_back_is_as_exact_as_the_oracle(dtype: torch.dtype) -> None:
    x = vectors(4, 1024, dtype=dtype)
    for op in ("fp8_act", "mxfp4_act"):
        got = getattr(ops, f"{op}_quantize")(x.to(DEVICE))
        got = getattr(ops, f"{op}_dequantize")(*got, dtype).cpu()
        want = getattr(quant, f"{op}_quantize")(x)
        want = getattr(quant, f"{op}_dequantize")(*want, dtype)
        assert_as_exact_as(op, got, want, x.double())


# Every op: alone and in a batch, poison, nothing to do, the registered op, a bad argument

OPS = sorted(quant_calls(0))
ROWWISE = [n for n in OPS if "block" not in n and n != "nvfp4_act_quantize"]
FIXED = ("global_scale",)
# PyTorch on the CPU has no closeness of FP8 tensors, which the check of the schema needs.
WITHOUT_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def op_named(name: str) -> Any:
    return getattr(ops, name.partition("/")[0])


@pytest.mark.parametrize("name", ROWWISE)
def test_a_token_does_not_depend_on_the_batch(name: str) -> None:
    args = quant_calls(40, 1024, DEVICE)[name]
    one = {k: v[33:34].clone() if isinstance(v, Tensor) and k not in FIXED else v
           for k, v in args.items()}  # fmt: skip
    many, alone = as_tuple(op_named(name)(**args)), as_tuple(op_named(name)(**one))
    for m, o in zip(many, alone, strict=True):
        assert_bits_equal(name, m[33:34] if m.dim() else m, o)


@pytest.mark.parametrize("name", OPS)
def test_every_output_is_written(name: str) -> None:
    args = quant_calls(5, 384, DEVICE)[name]
    kernel = getattr(kernels, name.partition("/")[0])
    want, out = as_tuple(op_named(name)(**args)), as_tuple(kernel.outputs(**args))
    for x in out:
        x.flatten().view(torch.uint8).fill_(0xFF)
    kernel.launch(**args, out=out if len(out) > 1 else out[0])
    for got, expected in zip(out, want, strict=False):
        assert_bits_equal(name, got, expected)


@pytest.mark.parametrize("name", OPS)
def test_nothing_to_do_changes_nothing(name: str) -> None:
    args = quant_calls(0, device=DEVICE)[name]
    before = {k: v.clone() for k, v in args.items() if isinstance(v, Tensor)}
    out = as_tuple(op_named(name)(**args))
    assert all(x.numel() == 0 for x in out if x.dim())
    for k, v in before.items():
        assert_bits_equal(k, args[k], v)
    if name == "nvfp4_act_quantize":
        assert out[2].item() == 1


@pytest.mark.parametrize("name", OPS)
def test_op_contract(name: str) -> None:
    args = quant_calls(3, device=DEVICE)[name]
    before = {k: v.clone() for k, v in args.items() if isinstance(v, Tensor)}
    is_narrow = any(v.element_size() == 1 for v in before.values())
    checks = {"test_utils": WITHOUT_SCHEMA} if is_narrow else {}
    torch.library.opcheck(op_named(name).op, (), args, **checks)
    for k, v in before.items():
        assert_bits_equal(k, args[k], v)


BAD = [
    ("fp8_act_quantize", "x", lambda x: x[:, :100].contiguous()),
    ("fp8_act_quantize", "group", lambda x: 96),
    ("fp8_act_dequantize", "scale", lambda x: x[1:]),
    ("fp8_act_dequantize", "dtype", lambda x: torch.float16),
    ("fp8_block_quantize", "w", lambda x: x[0]),
    ("fp8_block_dequantize", "scale", lambda x: x[:, :1].contiguous()),
    ("fp8_block_dequantize", "data", lambda x: x.view(torch.uint8)),
    ("mxfp4_act_quantize", "x", lambda x: x.half()),
    ("mxfp4_act_quantize", "group", lambda x: 1),
    ("mxfp4_act_dequantize", "packed", lambda x: x.int()),
    ("nvfp4_act_quantize", "x", lambda x: x.t()),
    ("nvfp4_act_quantize/given", "global_scale", lambda x: x[None]),
    ("nvfp4_act_dequantize", "scale", lambda x: x.view(torch.uint8)),
]


@pytest.mark.parametrize(("name", "argument", "spoil"), BAD)
def test_a_bad_argument_is_named(name: str, argument: str, spoil: Any) -> None:
    args = quant_calls(4, device=DEVICE)[name]
    args[argument] = spoil(args[argument])
    with pytest.raises(ValueError, match=argument) as error:
        op_named(name)(**args)
    assert "expected" in str(error.value)
    assert "got" in str(error.value)
