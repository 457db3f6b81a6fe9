"""Records and pages against the simulation, bit for bit, and against bytes laid out by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.core.errors import ConfigError, RequestError
from dsv4.core.kv_layout import IndexKeys, IndexRecord, KvRecord
from dsv4.reference import kv_records as kr
from dsv4.reference.quant import simulate_fp8, simulate_index_fp8, simulate_mxfp4
from dsv4.testing.numeric import assert_bits_equal

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FLOATS = [torch.float32, torch.float64, torch.bfloat16]
KEYS: list[IndexKeys] = ["fp8", "mxfp4"]


def vectors(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Normal numbers, every row of another magnitude, with a zero row and negative zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    x = x * 2.0 ** torch.randint(-12, 12, (*shape[:-1], 1), generator=g).double()
    x[..., 0, :] = 0.0
    x[..., 3::17] = -0.0
    return x.to(dtype)


def simulated(kv: Tensor, rope_dim: int = 64) -> Tensor:
    """What the official model keeps: FP8 on the nope dims, BF16 on the RoPE dims."""
    nope, rope = kv.split((kv.shape[-1] - rope_dim, rope_dim), dim=-1)
    return torch.cat((simulate_fp8(nope, 64), rope.to(torch.bfloat16).to(kv.dtype)), dim=-1)


def simulated_key(k: Tensor, keys: IndexKeys) -> Tensor:
    return simulate_index_fp8(k) if keys == "fp8" else simulate_mxfp4(k)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [512, 128, 192])
def test_kv_record_equals_the_simulation(head_dim: int, device: str, dtype: torch.dtype) -> None:
    kv = vectors(9, head_dim, dtype=dtype).to(device)
    records = kr.kv_record_pack(kv)
    assert records.shape == (9, KvRecord(head_dim).nbytes)
    assert records.dtype == torch.uint8
    assert_bits_equal("record", kr.kv_record_unpack(records, dtype), simulated(kv))


def test_kv_record_bytes_by_hand() -> None:
    kv = torch.zeros(1, 512)
    kv[0, 0], kv[0, 1], kv[0, 447] = 448.0, -1.0, 896.0
    kv[0, 448], kv[0, 511] = 1.0, -2.0
    record = kr.kv_record_pack(kv)[0].numpy()
    assert record.shape == (584,)
    assert (record[0], record[1], record[447]) == (0x7E, 0xB8, 0x7E)
    # BF16 is little endian: 1.0 is 0x3F80, -2.0 is 0xC000.
    assert record[448:450].tobytes() == b"\x80\x3f"
    assert record[574:576].tobytes() == b"\x00\xc0"
    # Scales: 2^0 for the first group, 2^-22 (the floor) for zeros, 2^1 for the last; one pad byte.
    assert record[576:].tolist() == [127, 105, 105, 105, 105, 105, 128, 0]


@pytest.mark.parametrize("num_entries", [1, 2, 5, 64])
@pytest.mark.parametrize("head_dim", [512, 128])
def test_kv_page_layout_and_values(head_dim: int, num_entries: int) -> None:
    record = KvRecord(head_dim)
    kv = vectors(3, num_entries, head_dim)
    page = kr.kv_page_pack(kv)
    assert page.shape == (3, record.page_bytes(num_entries))
    rows = kr.kv_record_pack(kv)
    split, used = num_entries * record.data_bytes, num_entries * record.nbytes
    for e in range(num_entries):
        data = page[:, e * record.data_bytes : (e + 1) * record.data_bytes]
        scale = page[:, split + e * 8 : split + (e + 1) * 8]
        assert_bits_equal("data", data, rows[:, e, : record.data_bytes])
        assert_bits_equal("scale", scale, rows[:, e, record.data_bytes :])
    assert (page[:, used:] == 0).all()
    assert_bits_equal("page", kr.kv_page_unpack(page, num_entries, head_dim), simulated(kv))


@pytest.mark.parametrize("num_entries", [1, 2])
def test_pages_of_a_pool_slice_with_an_odd_offset(num_entries: int) -> None:
    kv = vectors(num_entries, 512)
    pool = torch.zeros(1 + KvRecord().page_bytes(num_entries), dtype=torch.uint8)
    pool[1:] = kr.kv_page_pack(kv)
    assert_bits_equal("page", kr.kv_page_unpack(pool[1:], num_entries), simulated(kv))
    pool = torch.zeros(1 + 132 * num_entries, dtype=torch.uint8)
    pool[1:] = kr.index_page_pack(kv[:, :128], "fp8")
    keys = kr.index_page_unpack(pool[1:], num_entries, "fp8")
    assert_bits_equal("keys", keys, simulated_key(kv[:, :128], "fp8"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("head_dim", [128, 64])
def test_index_record_equals_the_simulation(
    head_dim: int, keys: IndexKeys, device: str, dtype: torch.dtype
) -> None:
    k = vectors(9, head_dim, dtype=dtype).to(device)
    pack = {"fp8": kr.index_record_pack_fp8, "mxfp4": kr.index_record_pack_mxfp4}[keys]
    records = pack(k)
    assert records.shape == (9, IndexRecord(head_dim, keys).nbytes)
    got = kr.index_record_unpack(records, keys, head_dim, dtype)
    assert_bits_equal("record", got, simulated_key(k, keys))


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("num_entries", [1, 3, 64])
def test_index_page_holds_values_then_scales(num_entries: int, keys: IndexKeys) -> None:
    k = vectors(2, num_entries, 128)
    page = kr.index_page_pack(k, keys)
    width = {"fp8": 128, "mxfp4": 64}[keys]
    assert page.shape == (2, num_entries * (width + 4))
    pack = {"fp8": kr.index_record_pack_fp8, "mxfp4": kr.index_record_pack_mxfp4}[keys]
    rows = pack(k)
    assert_bits_equal("values", page[:, : num_entries * width], rows[..., :width].flatten(-2))
    assert_bits_equal("scales", page[:, num_entries * width :], rows[..., width:].flatten(-2))
    assert_bits_equal("page", kr.index_page_unpack(page, num_entries, keys), simulated_key(k, keys))


def test_index_record_bytes_by_hand() -> None:
    k = torch.zeros(1, 128)
    k[0, 0], k[0, 1], k[0, 127] = 896.0, -2.0, 0.0
    fp8 = kr.index_record_pack_fp8(k)[0].numpy()
    assert (fp8[0], fp8[1]) == (0x7E, 0xB8)
    assert np.frombuffer(fp8[128:].tobytes(), "<f4").tolist() == [2.0]
    k[0, 0], k[0, 1], k[0, 33] = 6.0, -3.0, 12.0
    mxfp4 = kr.index_record_pack_mxfp4(k)[0].numpy()
    assert (mxfp4[0], mxfp4[16]) == (0xD7, 0x70)  # low nibble first
    assert mxfp4[64:].tolist() == [127, 128, 1, 1]


def test_nan_is_kept() -> None:
    kv = torch.ones(1, 512)
    kv[0, 70] = float("nan")
    back = kr.kv_record_unpack(kr.kv_record_pack(kv), torch.float32)
    assert back[0, 64:128].isnan().all()
    assert (back[0, :64] == 1).all()
    assert (back[0, 128:] == 1).all()
    for keys, pack in zip(
        KEYS, (kr.index_record_pack_fp8, kr.index_record_pack_mxfp4), strict=True
    ):
        assert kr.index_record_unpack(pack(kv[:, :128]), keys)[0, 64:96].isnan().all()


def test_no_entries() -> None:
    assert kr.kv_record_unpack(kr.kv_record_pack(torch.zeros(0, 512))).shape == (0, 512)
    for keys, pack in zip(
        KEYS, (kr.index_record_pack_fp8, kr.index_record_pack_mxfp4), strict=True
    ):
        assert kr.index_record_unpack(pack(torch.zeros(0, 128)), keys).shape == (0, 128)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="head_dim"):
        kr.kv_record_pack(torch.zeros(2, 500))
    with pytest.raises(ValueError, match="kv: expected float32, float64 or bfloat16"):
        kr.kv_record_pack(torch.zeros(2, 512, dtype=torch.int64))
    with pytest.raises(ValueError, match="kv: expected at least 2 dims"):
        kr.kv_page_pack(torch.zeros(512))
    with pytest.raises(ValueError, match=r"records: expected torch\.uint8"):
        kr.kv_record_unpack(torch.zeros(2, 584))
    with pytest.raises(ValueError, match="records: expected the bytes of a record"):
        kr.kv_record_unpack(torch.zeros(2, 583, dtype=torch.uint8))
    with pytest.raises(ValueError, match="page: expected 37440 bytes in the last dim, got 37376"):
        kr.kv_page_unpack(torch.zeros(37376, dtype=torch.uint8), 64)
    with pytest.raises(ValueError, match="records: expected 68 bytes in the last dim, got 132"):
        kr.index_record_unpack(torch.zeros(1, 132, dtype=torch.uint8), "mxfp4")
    with pytest.raises(RequestError, match="index_keys: expected one of"):
        kr.index_page_pack(torch.zeros(1, 128), "fp16")
