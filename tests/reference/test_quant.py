"""The casts against tables and rounding written independently in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4.core.formats import FP8_BLOCK128, MXFP4, NVFP4, BlockScaledTensor
from dsv4.reference import quant as q
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal, relative_error

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FLOATS = [torch.float32, torch.float64, torch.bfloat16]


def e4m3_value(code: int) -> float:
    """One code of E4M3 without infinities, from its fields."""
    sign, exponent, mantissa = (-1.0) ** (code >> 7), (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3 = np.array([e4m3_value(c) for c in range(256)])
E4M3_POSITIVE = E4M3[:127]  # 0 to 448, ascending with the code
E2M1_POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Codes of the nearest entries of an ascending table; ties to the even code; saturating."""
    gap = np.abs(np.abs(x.astype(np.float64)).clip(0, table[-1])[..., None] - table)
    best = gap.min(axis=-1, keepdims=True)
    is_best = gap == best
    is_even = np.arange(len(table)) % 2 == 0
    preferred = np.where(
        (is_best & is_even).any(axis=-1, keepdims=True), is_best & is_even, is_best
    )
    return preferred.argmax(axis=-1) | np.where(np.signbit(x), 1 << int(np.log2(len(table) + 1)), 0)


def probes(table: np.ndarray) -> np.ndarray:
    """Every entry, every midpoint, their FP32 neighbours, values beyond the end; both signs."""
    middles = (table[1:] + table[:-1]) / 2
    points = np.concatenate([table, middles, [table[-1] * 1.03, table[-1] * 7, 1e-30]])
    points = points.astype(np.float32)
    sides = [np.nextafter(points, np.float32(d)).astype(np.float32) for d in (-np.inf, np.inf)]
    points = np.concatenate([points, *sides]).clip(0, None)
    return np.concatenate([points, -points])


def power_of_two(amax: np.ndarray, max_value: float, floor: float) -> np.ndarray:
    """Smallest power of two at or above the FP32 product, by frexp."""
    product = np.maximum(amax.astype(np.float32), np.float32(floor)) * np.float32(1 / max_value)
    mantissa, exponent = np.frexp(product.astype(np.float64))
    return np.ldexp(1.0, exponent - (mantissa == 0.5))


def as_codes(x: Tensor) -> np.ndarray:
    return x.cpu().view(torch.uint8).numpy()


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal numbers whose magnitude differs from row to row by many powers of two."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.randint(-20, 20, (*shape[:-1], 1), generator=g).double()
    return (torch.randn(shape, generator=g, dtype=torch.float64) * 2.0**spread).to(dtype).to(device)


# --- elements and scales --------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_e4m3_round_agrees_with_the_table_at_every_code_and_midpoint(device: str) -> None:
    x = probes(E4M3_POSITIVE)
    got = as_codes(q.e4m3_round(torch.from_numpy(x).to(device)))
    np.testing.assert_array_equal(got, nearest(x, E4M3_POSITIVE))
    infinite = torch.tensor([torch.inf, -torch.inf], device=device)
    assert as_codes(q.e4m3_round(infinite)).tolist() == [0x7E, 0xFE]


@pytest.mark.parametrize("device", DEVICES)
def test_every_e4m3_code_reads_back_as_its_fields_say(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(codes.to(torch.float32).cpu().numpy(), E4M3)
    kept = as_codes(q.e4m3_round(codes.to(torch.float32)))
    finite = ~np.isnan(E4M3)
    np.testing.assert_array_equal(kept[finite], np.arange(256)[finite])
    assert np.isin(kept[~finite], (0x7F, 0xFF)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_e2m1_encode_agrees_with_the_table(device: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(probes(E2M1_POSITIVE)).to(dtype)
    got = q.e2m1_encode(x.to(device)).cpu().numpy()
    np.testing.assert_array_equal(got, nearest(x.double().numpy(), E2M1_POSITIVE))


def test_e2m1_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0])
    want = [0, 1, 1, 2, 2, 4, 4, 6]
    assert q.e2m1_decode(q.e2m1_encode(ties)).tolist() == want
    assert q.e2m1_decode(q.e2m1_encode(-ties)).tolist() == [-v for v in want]
    assert q.e2m1_encode(torch.tensor([-0.0, -0.1])).tolist() == [8, 8]  # the sign of zero stays


def test_e2m1_decode_knows_all_sixteen_codes() -> None:
    got = q.e2m1_decode(torch.arange(16, dtype=torch.uint8))
    want = torch.from_numpy(np.concatenate([E2M1_POSITIVE, -E2M1_POSITIVE])).float()
    assert_bits_equal("e2m1", got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_e8m0_decode_knows_all_256_codes(device: str) -> None:
    scale = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu)
    got = q.e8m0_decode(scale).cpu().numpy()
    np.testing.assert_array_equal(got[:255], 2.0 ** (np.arange(255) - 127.0))
    assert np.isnan(got[255])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 0x7F7FFFFF), min_size=1, max_size=20), st.sampled_from([448.0, 6.0]))
def test_e8m0_scale_is_the_smallest_power_of_two(bits: list[int], max_value: float) -> None:
    amax = np.array(bits, dtype=np.uint32).view(np.float32)
    floor = q.FP8_FLOOR if max_value == 448 else q.FP4_FLOOR
    got = q.e8m0_decode(q.e8m0_scale(torch.from_numpy(amax), max_value, floor)).numpy()
    np.testing.assert_array_equal(got, power_of_two(amax, max_value, floor))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("max_value", "floor"), [(448.0, q.FP8_FLOOR), (6.0, q.FP4_FLOOR)])
def test_e8m0_scale_at_exact_powers_and_beside_them(
    max_value: float, floor: float, device: str
) -> None:
    exact = (max_value * 2.0 ** np.arange(-20.0, 60.0)).astype(np.float32)
    for x in (exact, np.nextafter(exact, np.float32(0)), exact * np.float32(1.001)):
        scale = q.e8m0_scale(torch.from_numpy(x).to(device), max_value, floor)
        np.testing.assert_array_equal(
            q.e8m0_decode(scale).cpu().numpy(), power_of_two(x, max_value, floor)
        )
    assert (q.e8m0_scale(torch.from_numpy(exact), max_value, floor).float().numpy()[20:]
            == 2.0 ** np.arange(0.0, 60.0)).all()  # fmt: skip


def test_e8m0_scale_has_its_floor_and_its_nan() -> None:
    special = torch.tensor([0.0, float("inf"), float("nan")])
    assert as_codes(q.e8m0_scale(special, 448.0, 1e-4)).tolist() == [127 - 22, 255, 255]
    assert as_codes(q.e8m0_scale(special, 6.0, q.FP4_FLOOR)).tolist() == [1, 255, 255]


# --- activations ----------------------------------------------------------------------------------


def test_fp8_check_vector() -> None:
    x = (3 * torch.sin(torch.arange(1, 65).float())).bfloat16()
    data, scale = q.fp8_act_quantize(x, 64)
    assert as_codes(scale).tolist() == [127 - 7]
    assert as_codes(data)[:8].tobytes().hex() == "7a7b66f9fced787c"
    assert q.simulate_fp8(x, 64)[:8].tolist() == [2.5, 2.75, 0.4375, -2.25, -3, -0.8125, 2, 3]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", [64, 128])
def test_fp8_act_quantize_agrees_with_numpy(group: int, device: str, dtype: torch.dtype) -> None:
    x = rows(1, 3, 9, 256, dtype=dtype, device=device)
    before = x.clone()
    data, scale = q.fp8_act_quantize(x, group)
    blocks = x.float().cpu().numpy().reshape(3, 9, -1, group)
    s = power_of_two(np.abs(blocks).max(-1), 448.0, 1e-4)
    np.testing.assert_array_equal(q.e8m0_decode(scale).cpu().numpy(), s)
    codes = nearest(blocks / s[..., None], E4M3_POSITIVE)
    np.testing.assert_array_equal(as_codes(data), codes.reshape(3, 9, 256))
    simulated = q.simulate_fp8(x, group)
    assert simulated.dtype == dtype
    want = torch.from_numpy((E4M3[codes] * s[..., None]).reshape(3, 9, 256))
    assert_bits_equal("simulate_fp8", simulated.cpu(), want.to(dtype))
    assert_bits_equal("input", x, before)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_simulate_mxfp4_agrees_with_numpy(device: str, dtype: torch.dtype) -> None:
    x = rows(2, 7, 128, dtype=dtype, device=device)
    blocks = x.float().cpu().numpy().reshape(7, 4, 32)
    s = power_of_two(np.abs(blocks).max(-1), 6.0, q.FP4_FLOOR)
    codes = nearest(blocks / s[..., None], E2M1_POSITIVE)
    value = np.concatenate([E2M1_POSITIVE, -E2M1_POSITIVE])[codes] * s[..., None]
    want = torch.from_numpy(value.reshape(7, 128)).to(dtype)
    assert_bits_equal("simulate_mxfp4", q.simulate_mxfp4(x).cpu(), want)


def test_simulate_index_fp8_has_one_scale_a_row() -> None:
    x = torch.zeros(2, 128)
    x[:, 0], x[:, 100] = 448.0, 0.011  # alone in a group, 0.011 would become 0.0107421875
    assert q.simulate_index_fp8(x)[:, [0, 100]].tolist() == [[448.0, 0.01171875]] * 2
    assert_bits_equal("row", q.simulate_index_fp8(x), q.simulate_fp8(x, 128))


@pytest.mark.parametrize("simulate", [lambda x: q.simulate_fp8(x, 64), q.simulate_mxfp4])
def test_simulation_propagates_nan_to_its_group_alone(simulate) -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.ones(1, 128)
        x[0, 3] = bad
        y = simulate(x)
        assert y[0, :32].isnan().all()
        assert (y[0, 64:] == 1).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(-15, 15))
def test_simulation_is_idempotent_and_scales_with_powers_of_two(seed: int, power: int) -> None:
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
    for simulate in (lambda v: q.simulate_fp8(v, 64), q.simulate_mxfp4):
        once = simulate(x)
        assert_bits_equal("twice", simulate(once), once)
        assert_bits_equal("scaled", simulate(x * 2.0**power), once * 2.0**power)
        assert (once - x).abs().max() <= x.abs().max() / 5 + 1e-6


def test_simulation_of_no_rows_and_of_a_bad_group() -> None:
    assert q.simulate_fp8(torch.zeros(0, 128), 64).shape == (0, 128)
    assert q.simulate_mxfp4(torch.zeros(0, 128)).shape == (0, 128)
    with pytest.raises(ValueError, match="x: expected a last dim divisible by 64, got shape"):
        q.simulate_fp8(torch.zeros(2, 100), 64)
    with pytest.raises(ValueError, match="x: expected a floating point tensor"):
        q.simulate_mxfp4(torch.zeros(2, 64, dtype=torch.int32))


# --- Hadamard -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 32, 128])
def test_hadamard_is_the_sylvester_matrix(n: int) -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), matrix)
    x = torch.randn(3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(q.hadamard(x), x @ matrix / n**0.5, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(q.hadamard(q.hadamard(x)), x, rtol=1e-14, atol=1e-14)


def test_hadamard_rounds_bfloat16_once() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_bits_equal("hadamard", q.hadamard(x), q.hadamard(x.float()).bfloat16())
    with pytest.raises(ValueError, match="power of two, got 96"):
        q.hadamard(torch.zeros(2, 96))


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(128, 128), (130, 200), (5, 7), (256, 384)])
def test_fp8_block_quantize_agrees_with_numpy(shape: tuple[int, int], device: str) -> None:
    w = rows(3, *shape, device=device)
    t = q.fp8_block_quantize(w)
    assert t.format is FP8_BLOCK128
    assert t.shape == shape
    got, x = q.dequantize(t).cpu().numpy(), w.cpu().numpy()
    for i in range(0, shape[0], 128):
        for j in range(0, shape[1], 128):
            tile = x[i : i + 128, j : j + 128]
            s = power_of_two(np.abs(tile).max(), 448.0, 1e-4)
            assert t.scale[i // 128, j // 128].float().item() == s
            want = E4M3[nearest(tile / s, E4M3_POSITIVE)] * s
            np.testing.assert_array_equal(got[i : i + 128, j : j + 128], want)


def test_mxfp4_quantize_writes_the_bytes_of_the_format() -> None:
    w = torch.zeros(1, 64)
    w[0, :4] = torch.tensor([6.0, -0.5, 1.5, -4.0])
    w[0, 32:34] = torch.tensor([0.25, -24.0])
    t = q.mxfp4_quantize(w)
    assert t.format is MXFP4
    assert t.data.dtype == torch.int8
    # The even element is the low nibble. 6: 7, -0.5: 9, 1.5: 3, -4: 14; then 0.25 / 4: 0, -6: 15.
    assert as_codes(t.data)[0, :2].tolist() == [0x97, 0xE3]
    assert as_codes(t.data)[0, 16].tolist() == 0xF0
    assert as_codes(t.scale).tolist() == [[127, 129]]
    assert q.dequantize(t)[0, :4].tolist() == [6.0, -0.5, 1.5, -4.0]
    assert q.dequantize(t)[0, 32:34].tolist() == [0.0, -24.0]


def test_mxfp4_weights_and_activations_share_one_rule() -> None:
    w = rows(4, 6, 96)
    assert_bits_equal("mxfp4", q.dequantize(q.mxfp4_quantize(w)), q.simulate_mxfp4(w))


@pytest.mark.parametrize("device", DEVICES)
def test_nvfp4_quantize_agrees_with_numpy(device: str) -> None:
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(5)).to(device)
    t = q.nvfp4_quantize(w)
    assert t.format is NVFP4
    assert t.data.dtype == torch.uint8
    x = w.cpu().numpy().reshape(6, 4, 16)
    share = np.abs(x).max() / np.float32(6 * 448)
    assert t.global_scale.item() == share
    ratio = np.abs(x).max(-1) / (np.float32(6) * share)
    scale = nearest(ratio, E4M3_POSITIVE)
    np.testing.assert_array_equal(as_codes(t.scale), scale)
    assert scale.max() == 126  # the largest block uses all of E4M3
    codes = nearest(x / (E4M3[scale].astype(np.float32) * share)[..., None], E2M1_POSITIVE)
    np.testing.assert_array_equal(
        q.unpack_nibbles(t.data).cpu().numpy(), codes.reshape(6, 64).astype(np.uint8)
    )
    value = np.concatenate([E2M1_POSITIVE, -E2M1_POSITIVE])[codes] * E4M3[scale][..., None]
    want = (value * np.float64(share)).reshape(6, 64)
    np.testing.assert_array_equal(q.dequantize(t, torch.float64).cpu().numpy(), want)


def test_nvfp4_shares_a_global_scale_and_keeps_faint_blocks() -> None:
    w1, w3 = torch.ones(2, 32), torch.ones(2, 32) * 5
    share = q.nvfp4_global_scale(w1, w3)
    assert share.item() == np.float32(5) / np.float32(2688)
    assert q.nvfp4_quantize(w1, share).global_scale == q.nvfp4_quantize(w3, share).global_scale
    faint = torch.ones(1, 32)
    faint[0, 16:] = 2e-6  # its scale would round to zero in E4M3
    t = q.nvfp4_quantize(faint)
    assert t.scale[0, 1].float().item() == 2.0**-9
    assert (q.dequantize(t)[0, 16:] > 0).all()
    zero = q.nvfp4_quantize(torch.zeros(2, 32))
    assert zero.global_scale.item() == 1
    assert (q.dequantize(zero) == 0).all()
    with pytest.raises(ValueError, match="global_scale: expected a positive finite number, got 0"):
        q.nvfp4_quantize(w1, torch.tensor(0.0))


def test_mxfp4_to_nvfp4_changes_no_value() -> None:
    w1, w3 = (q.mxfp4_quantize(rows(s, 8, 64) * 2.0**-18) for s in (6, 7))
    w1.scale.view(torch.uint8).clamp_(110, 120)
    w3.scale.view(torch.uint8).clamp_(115, 127)
    a = q.mxfp4_to_nvfp4(w1, shared_with=w3, input_scale=torch.tensor(0.5))
    b = q.mxfp4_to_nvfp4(w3, shared_with=w1)
    assert a.format is NVFP4
    assert a.global_scale == b.global_scale == 2.0 ** (int(w3.scale.view(torch.uint8).max()) - 135)
    assert a.input_scale.item() == 0.5
    for before, after in ((w1, a), (w3, b)):
        assert_bits_equal("cast", q.dequantize(after), q.dequantize(before))


def test_mxfp4_to_nvfp4_refuses_what_does_not_fit() -> None:
    w = torch.ones(1, 96)
    w[0, 32:64] = 2.0**-17
    w[0, 64:] = -0.0  # scale 2^-126, but nothing to lose
    t = q.mxfp4_quantize(w)
    assert_bits_equal("17 powers", q.dequantize(q.mxfp4_to_nvfp4(t)), q.dequantize(t))
    w[0, 32:64] = 2.0**-18
    with pytest.raises(ValueError, match="within 17 of the largest, -2, got -20"):
        q.mxfp4_to_nvfp4(q.mxfp4_quantize(w))
    zero = q.mxfp4_quantize(torch.zeros(2, 32))
    assert (q.dequantize(q.mxfp4_to_nvfp4(zero)) == 0).all()
    zero.scale.view(torch.uint8)[0, 0] = 255
    with pytest.raises(ValueError, match="got NaN"):
        q.mxfp4_to_nvfp4(zero)
    with pytest.raises(ValueError, match="t: expected mxfp4"):
        q.mxfp4_to_nvfp4(q.nvfp4_quantize(torch.ones(1, 32)))


@pytest.mark.parametrize("quantize", [q.fp8_block_quantize, q.mxfp4_quantize])
def test_dequantize_is_exact_in_every_dtype(quantize) -> None:
    t = quantize(rows(8, 140, 160))
    exact = q.dequantize(t, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        assert_bits_equal(str(dtype), q.dequantize(t, dtype).double(), exact)
    assert_bits_equal("again", q.dequantize(quantize(exact)), exact.float())


def test_dequantize_takes_float32_scales_for_fp8_alone() -> None:
    data = torch.ones(2, 130).to(torch.float8_e4m3fn)
    t = BlockScaledTensor(FP8_BLOCK128, data, torch.tensor([[0.3, 3.0]]))
    got = q.dequantize(t)
    assert (got[:, :128] == np.float32(0.3)).all()
    assert (got[:, 128:] == 3).all()
    bad = BlockScaledTensor(MXFP4, torch.zeros(1, 16, dtype=torch.int8), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"scale: expected F8_E8M0 for mxfp4, got torch\.float32"):
        q.dequantize(bad)
    wrong = BlockScaledTensor(MXFP4, torch.zeros(1, 16), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"data: expected torch\.int8 or torch\.uint8"):
        q.dequantize(wrong)
    wrong = BlockScaledTensor(FP8_BLOCK128, torch.zeros(1, 16), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"data: expected torch\.float8_e4m3fn"):
        q.dequantize(wrong)


def test_weight_quantisers_refuse_bad_weights() -> None:
    for quantize in (q.fp8_block_quantize, q.mxfp4_quantize, q.nvfp4_quantize):
        with pytest.raises(ValueError, match="w: expected finite weights"):
            quantize(torch.full((2, 32), float("nan")))
        with pytest.raises(ValueError, match=r"w: expected a float matrix \[N, K\]"):
            quantize(torch.zeros(32))


def test_nibbles_survive_packing() -> None:
    code = torch.arange(16, dtype=torch.uint8).repeat(3, 2)
    packed = q.pack_nibbles(code)
    assert packed[0, 0].item() == 0x10
    assert_bits_equal("uint8", q.unpack_nibbles(packed), code)
    assert_bits_equal("int8", q.unpack_nibbles(packed.view(torch.int8)), code)


# --- the comparisons these tests rest on ----------------------------------------------------------


def test_bits_equal_names_the_first_difference() -> None:
    want = torch.zeros(3, 4)
    got = want.clone()
    got[1, 2], got[2, 0] = -0.0, 1.0
    with pytest.raises(
        AssertionError, match=r"q\[1, 2\]: got -0.0 \(0x80000000\), want 0.0 \(0x0\)"
    ):
        assert_bits_equal("q", got, want)
    with pytest.raises(AssertionError, match="2 of 12 elements differ"):
        assert_bits_equal("q", got, want)
    with pytest.raises(AssertionError, match=r"q: expected torch\.float32 \[3, 4\], got"):
        assert_bits_equal("q", got.double(), want)
    with pytest.raises(AssertionError, match=r"got torch\.float32 \[4, 3\]"):
        assert_bits_equal("q", got.T, want)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bool):
        x = torch.ones(5).to(dtype)
        assert_bits_equal("same", x, x.clone())
        with pytest.raises(AssertionError, match=r"other\[0\]"):
            assert_bits_equal("other", x, torch.zeros(5).to(dtype))
    nan = torch.tensor([float("nan")])
    assert_bits_equal("nan", nan, nan.clone())


def test_as_exact_as_allows_twice_the_error_and_no_more() -> None:
    exact = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    same = (exact + torch.tensor([0.0, 1e-3, 0.0])).float()
    off = torch.tensor([0.0, 0.0, 1e-3])
    assert_as_exact_as("x", (exact + 1.9 * off).float(), same, exact)
    with pytest.raises(AssertionError, match=r"x\[2\]: error 2\.1.*e-03 exceeds 2\.0.*e-03"):
        assert_as_exact_as("x", (exact + 2.1 * off).float(), same, exact)
    assert_as_exact_as("x", (exact + 2.9 * off).float(), same, exact, factor=3)
    assert_as_exact_as("x", exact.float(), exact.float(), exact)
    one_place_up = torch.nextafter(exact.float(), torch.tensor(9.0))
    assert_as_exact_as("x", one_place_up, exact.float(), exact)
    assert_as_exact_as("empty", torch.zeros(0), torch.zeros(0), torch.zeros(0).double())
    for bad in (float("nan"), float("inf")):
        with pytest.raises(AssertionError, match=r"x\[1\]"):
            assert_as_exact_as("x", torch.tensor([1.0, bad, 4.0]), same, exact)
        with pytest.raises(AssertionError, match="the oracle is not finite"):
            assert_as_exact_as("x", same, torch.tensor([1.0, bad, 4.0]), exact)
    with pytest.raises(AssertionError, match=r"x: shape \[2\], same has \[3\]"):
        assert_as_exact_as("x", same[:2], same, exact)


def test_relative_error() -> None:
    want = torch.tensor([0.5, -4.0])
    assert relative_error(torch.tensor([0.5, -3.0]), want) == 0.25
    assert relative_error(want.bfloat16(), want) == 0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    assert not relative_error(torch.tensor([float("nan"), -4.0]), want) < 1e9
    with pytest.raises(ValueError, match=r"got: expected shape \[2\], got \[1\]"):
        relative_error(torch.zeros(1), want)
