"""The published byte figures, and the layout rules behind them."""

from dataclasses import replace
from fractions import Fraction

import pytest

from dsv4.core import kv_layout as kv
from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.errors import ConfigError, RequestError

FLASH, PRO, NANO = ModelConfig.flash(), ModelConfig.pro(), ModelConfig.nano()


def test_kv_record_is_584_bytes() -> None:
    r = kv.KvRecord.of(FLASH)
    assert (r.nope_dim, r.num_scales, r.data_bytes, r.scale_bytes, r.nbytes) == (
        448,
        7,
        576,
        8,
        584,
    )
    assert r == kv.KvRecord.of(PRO) == kv.KvRecord.of(NANO) == kv.KvRecord()


def test_kv_record_of_a_small_head() -> None:
    r = kv.KvRecord(head_dim=128, rope_dim=64)
    assert (r.num_scales, r.data_bytes, r.scale_bytes, r.nbytes) == (1, 192, 8, 200)


@pytest.mark.parametrize(
    ("entries", "stride"), [(1, 1152), (2, 1728), (32, 19008), (64, 37440), (72, 42048)]
)
def test_kv_page_stride_is_a_multiple_of_576(entries: int, stride: int) -> None:
    r = kv.KvRecord()
    assert r.page_bytes(entries) == stride
    assert stride % 576 == 0
    assert 0 <= stride - entries * 584 < 576
    assert r.scale_offset(entries) == entries * 576


def test_index_records_and_pages() -> None:
    fp8, mxfp4 = (kv.IndexRecord.of(FLASH, keys) for keys in kv.INDEX_KEYS)
    assert (fp8.value_bytes, fp8.scale_bytes, fp8.nbytes, fp8.page_bytes(64)) == (128, 4, 132, 8448)
    assert (mxfp4.value_bytes, mxfp4.scale_bytes, mxfp4.nbytes) == (64, 4, 68)
    assert mxfp4.page_bytes(64) == 4352
    assert (fp8.scale_offset(64), mxfp4.scale_offset(64)) == (8192, 4096)


def test_compressor_state() -> None:
    assert kv.compressor_state_bytes(FLASH, LayerKind.SWA) == 0
    assert kv.compressor_state_bytes(FLASH, LayerKind.CSA) == 65_536 + 16_384
    assert kv.compressor_state_bytes(FLASH, LayerKind.HCA) == 524_288


@pytest.mark.parametrize(
    ("config", "state", "windows"),
    [(FLASH, 12_206_080, 3_214_336), (PRO, 18_710_528, 4_559_872)],
)
def test_fixed_bytes_of_a_request(config: ModelConfig, state: int, windows: int) -> None:
    assert kv.window_bytes(config) == 74_752
    assert kv.fixed_state_bytes(config) == state
    assert kv.fixed_window_bytes(config) == windows
    assert kv.mtp_window_bytes(config) == 74_752


def test_mtp_windows_are_those_of_mtp_blocks_alone() -> None:
    assert kv.mtp_window_bytes(replace(NANO, num_nextn_predict_layers=0)) == 0
    assert kv.mtp_window_bytes(replace(FLASH, dspark_block_size=5)) == 0


@pytest.mark.parametrize(
    ("config", "keys", "growth"),
    [
        (FLASH, "fp8", "3850.25"),
        (FLASH, "mxfp4", "3514.25"),
        (PRO, "fp8", "5511.4375"),
        (PRO, "mxfp4", "5031.4375"),
    ],
)
def test_growth_per_token(config: ModelConfig, keys: kv.IndexKeys, growth: str) -> None:
    assert kv.growth_per_token(config, keys) == Fraction(growth)


def test_growth_of_each_kind() -> None:
    growth = {kind: kv.layer_bytes(FLASH, kind).growth for kind in LayerKind}
    assert growth == {
        LayerKind.SWA: 0,
        LayerKind.CSA: 146 + 33,
        LayerKind.HCA: Fraction("4.5625"),
    }
    assert kv.layer_bytes(FLASH, LayerKind.CSA, "mxfp4").growth == 146 + 17


@pytest.mark.parametrize(("page_tokens", "hca_entries"), [(128, 1), (256, 2), (1024, 8)])
def test_page_set_is_the_sum_of_the_pages_of_all_layers(page_tokens: int, hca_entries: int) -> None:
    csa = kv.layer_bytes(FLASH, LayerKind.CSA, "fp8", page_tokens)
    hca = kv.layer_bytes(FLASH, LayerKind.HCA, "fp8", page_tokens)
    assert hca.page_bytes == kv.KvRecord().page_bytes(hca_entries)
    assert csa.page_bytes == kv.KvRecord().page_bytes(page_tokens // 4) + page_tokens // 4 * 132
    total = kv.page_set_bytes(FLASH, "fp8", page_tokens)
    assert total == 21 * csa.page_bytes + 20 * hca.page_bytes
    padding = total - page_tokens * kv.growth_per_token(FLASH)
    assert 0 <= padding < 41 * 576


def test_default_page_set_of_flash() -> None:
    # 21 * (37,440 + 8,448) + 20 * 1,728: 1.3 % above the growth, all of it padding to 576 B
    assert kv.page_set_bytes(FLASH) == 998_208


def test_bad_arguments_are_named() -> None:
    for bad in (0, -128, 64, 192, 128.0, True):
        with pytest.raises(RequestError, match="page_tokens: expected a positive multiple of 128"):
            kv.page_set_bytes(FLASH, "fp8", bad)
    with pytest.raises(RequestError, match="index_keys: expected one of"):
        kv.growth_per_token(FLASH, "fp16")
    with pytest.raises(ConfigError, match="head_dim"):
        kv.KvRecord(head_dim=100, rope_dim=64)
    with pytest.raises(ConfigError, match="head_dim"):
        kv.KvRecord(head_dim=64, rope_dim=64)
    with pytest.raises(ConfigError, match="index_head_dim"):
        kv.IndexRecord(head_dim=16)
    with pytest.raises(RequestError, match="num_entries"):
        kv.KvRecord().page_bytes(0)


def test_layout_version_is_pinned() -> None:
    assert kv.LAYOUT_VERSION == 1
