"""Simulated roundings: each form of KV records, and experts in another storage format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.core.formats import FP8_BLOCK128, MXFP4, NVFP4, BlockScaledTensor
from dsv4.reference.expert_formats import requantize_experts
from dsv4.reference.kv_records import kv_record_pack, kv_record_unpack
from dsv4.reference.quant import (
    dequantize,
    mxfp4_quantize,
    mxfp4_to_nvfp4,
    nvfp4_quantize,
    simulate_fp8,
    simulate_nvfp4,
)
from dsv4.reference.simulation import KV, QuantSimulation
from dsv4.testing.numeric import assert_bits_equal

FLOATS = [torch.float32, torch.float64, torch.bfloat16]
EXPERT = "layers.0.ffn.experts.3"


def draw(seed: int, *shape: int) -> Tensor:
    """Normal numbers, the last columns a hundred times as large."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., -8:] *= 100
    return x


# --- NVFP4 along rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_simulate_nvfp4_is_the_weight_format_of_each_row_alone(dtype: torch.dtype) -> None:
    x = (draw(0, 6, 448) * torch.logspace(-6, 6, 6)[:, None]).to(dtype)
    x[2] = 0
    want = torch.cat([dequantize(nvfp4_quantize(row[None])) for row in x])
    assert_bits_equal("simulate_nvfp4", simulate_nvfp4(x), want.to(dtype))
    assert_bits_equal("shape", simulate_nvfp4(x.view(2, 3, 448)), want.to(dtype).view(2, 3, 448))


def test_simulate_nvfp4_by_hand() -> None:
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([2688.0, 1300.0, 200.0])  # global 1, scale 448: 6, 2.9 and 0.45 units
    x[0, 16:18] = torch.tensor([6.1, -2.4])  # scale 1.0166 -> 1: 6 and -2
    got = simulate_nvfp4(x)
    assert got[0, :3].tolist() == [2688.0, 3 * 448.0, 0.5 * 448.0]
    assert got[0, 16:18].tolist() == [6.0, -2.0]


def test_simulate_nvfp4_lets_no_row_touch_another() -> None:
    x = draw(1, 4, 64)
    for bad in (float("nan"), float("inf")):
        y = x.clone()
        y[1, 5] = bad
        got = simulate_nvfp4(y)
        assert got[1].isnan().all()
        assert_bits_equal("others", got[[0, 2, 3]], simulate_nvfp4(x)[[0, 2, 3]])
    assert simulate_nvfp4(torch.zeros(0, 64)).shape == (0, 64)
    with pytest.raises(ValueError, match="x: expected a last dim divisible by 16, got shape"):
        simulate_nvfp4(torch.zeros(2, 100))


# --- KV records -----------------------------------------------------------------------------------


def test_the_fp8_record_is_what_the_paged_cache_gives_back() -> None:
    kv = draw(2, 5, 512)
    want = kv_record_unpack(kv_record_pack(kv), torch.float32)
    assert_bits_equal("record", QuantSimulation(kv="fp8_record").round_kv(kv, 64), want)


@pytest.mark.parametrize("kv", KV)
def test_each_form_rounds_its_dims_and_no_others(kv: str) -> None:
    x = draw(3, 5, 512)
    got = QuantSimulation(kv=kv).round_kv(x, 64)
    assert got.dtype == x.dtype
    bf16 = x.bfloat16().float()
    nope = {"none": x, "bf16": bf16, "nvfp4_record": simulate_nvfp4(x[:, :448])}
    rope = {"none": x, "fp8": x, "fp8_all": simulate_fp8(x[:, 448:], 64)}
    want_nope = nope.get(kv, simulate_fp8(x[:, :448], 64))[:, :448]
    assert_bits_equal("nope", got[:, :448], want_nope)
    assert_bits_equal("rope", got[:, 448:], rope.get(kv, bf16)[:, -64:])


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kv: expected one of \('none', .*, got 'int8'"):
        QuantSimulation(kv="int8")
    with pytest.raises(ValueError, match=r"indexer: expected one of \('none', .*, got 'bf16'"):
        QuantSimulation(indexer="bf16")


# --- experts in another format --------------------------------------------------------------------


def checkpoint() -> dict[str, Tensor | BlockScaledTensor]:
    """One MXFP4 expert, a shared expert, and a name that only looks like an expert's."""
    stored: dict[str, Tensor | BlockScaledTensor] = {
        f"{EXPERT}.{leaf}.weight": mxfp4_quantize(torch.randn(
            shape, generator=torch.Generator().manual_seed(i)) * 2.0**-i)
        for i, (leaf, shape) in enumerate(
            {"w1": (128, 256), "w2": (256, 128), "w3": (128, 256)}.items())
    }  # fmt: skip
    stored["layers.0.ffn.shared_experts.w1.weight"] = torch.ones(128, 256)
    stored["layers.0.ffn.gate.weight"] = torch.ones(16, 256)
    return stored


def error(got: dict[str, Tensor | BlockScaledTensor], leaf: str) -> float:
    """Relative rms of one matrix of the expert against what was stored."""
    name = f"{EXPERT}.{leaf}.weight"
    want, new = checkpoint()[name], got[name]
    assert isinstance(want, BlockScaledTensor)
    w = dequantize(want)
    x = dequantize(new) if isinstance(new, BlockScaledTensor) else new
    return float((x - w).norm() / w.norm())


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4_cast", "fp8"])
def test_stored_experts_lose_nothing_in_a_format_that_holds_them(format: str) -> None:
    got = requantize_experts(checkpoint(), format)
    assert [error(got, leaf) for leaf in ("w1", "w2", "w3")] == [0.0, 0.0, 0.0]


def test_nvfp4_made_anew_rounds_and_w1_and_w3_share_the_global_scale() -> None:
    stored = checkpoint()
    got = requantize_experts(stored, "nvfp4")
    w1, w2, w3 = (got[f"{EXPERT}.{leaf}.weight"] for leaf in ("w1", "w2", "w3"))
    for x in (w1, w2, w3):
        assert isinstance(x, BlockScaledTensor)
        assert x.format is NVFP4
    assert isinstance(w1, BlockScaledTensor)
    assert isinstance(w3, BlockScaledTensor)
    assert w1.global_scale is not None
    assert w1.global_scale == w3.global_scale
    largest = max(
        float(dequantize(x).abs().max())
        for leaf in ("w1", "w3")
        for x in (stored[f"{EXPERT}.{leaf}.weight"],)
        if isinstance(x, BlockScaledTensor)
    )
    assert float(w1.global_scale) == pytest.approx(largest / 2688)
    assert 0.01 < error(got, "w2") < 0.2


def test_rotated_experts_lie_on_no_grid() -> None:
    """What rounds Gaussian numbers: MXFP4 most, then NVFP4, then FP8."""
    formats = ("mxfp4", "nvfp4", "fp8")
    worst = [
        max(error(requantize_experts(checkpoint(), f, is_rotated=True), leaf)
            for leaf in ("w1", "w2", "w3"))
        for f in formats
    ]  # fmt: skip
    assert worst == sorted(worst, reverse=True)
    for value, (low, high) in zip(worst, ((0.10, 0.15), (0.08, 0.11), (0.02, 0.03)), strict=True):
        assert low < value < high


def test_formats_are_what_they_say_and_the_rest_is_passed_on() -> None:
    stored = checkpoint()
    for format, kind in (("mxfp4", MXFP4), ("nvfp4_cast", NVFP4), ("fp8", FP8_BLOCK128)):
        got = requantize_experts(stored, format)
        assert list(got) == list(stored)
        for name, value in got.items():
            if ".experts." in name:
                assert isinstance(value, BlockScaledTensor)
                assert value.format is kind
            else:
                assert value is stored[name]
    name = f"{EXPERT}.w2.weight"
    got, w2 = requantize_experts(stored, "nvfp4_cast")[name], stored[name]
    assert isinstance(got, BlockScaledTensor)
    assert isinstance(w2, BlockScaledTensor)
    assert_bits_equal("cast", got.scale, mxfp4_to_nvfp4(w2).scale)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match=r"format: expected one of .*, got 'int4'"):
        requantize_experts(checkpoint(), "int4")
    with pytest.raises(ValueError, match="format: expected one that rounds with is_rotated"):
        requantize_experts(checkpoint(), "nvfp4_cast", is_rotated=True)
    plain = {f"{EXPERT}.w2.weight": torch.ones(4, 32)}
    with pytest.raises(ValueError, match="expected mxfp4 to cast without rounding, got torch.flo"):
        requantize_experts(plain, "nvfp4_cast")
