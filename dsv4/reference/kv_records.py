"""KV records, index keys and their pages, written and read byte by byte.

The meaning of the paged cache: whatever a kernel stores must equal `*_pack`, and whatever it reads
must equal `*_unpack`. The layouts are those of dsv4.core.kv_layout; S counts entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.core.kv_layout import SCALE_GROUP, IndexKeys, IndexRecord, KvRecord
from dsv4.reference.quant import (
    e8m0_decode,
    fp8_act_dequantize,
    fp8_act_quantize,
    mxfp4_act_dequantize,
    mxfp4_act_quantize,
)

ROPE_DIM = 64


def kv_record_pack(kv: Tensor, rope_dim: int = ROPE_DIM) -> Tensor:
    """Write KV vectors as records: E4M3 with a UE8M0 scale per 64 nope dims, BF16 RoPE dims.

    kv [..., S, C]  float32, float64 or bfloat16, RoPE applied
    ->              uint8 [..., S, 584] for C = 512; the pad byte is zero

    Raises ValueError for another dtype and ConfigError unless C - rope_dim is a multiple of 64.
    """
    return torch.cat(_kv_parts(kv, rope_dim), dim=-1)


def kv_record_unpack(
    records: Tensor, dtype: torch.dtype = torch.bfloat16, rope_dim: int = ROPE_DIM
) -> Tensor:
    """Read records: uint8 [..., S, 584] -> `dtype` [..., S, 512].

    unpack(pack(x)) is `simulate_fp8(x, 64)` on the nope dims and x rounded to BF16 on the others.
    """
    _check_bytes("records", records, 2)
    record = _kv_record_of_bytes(records.shape[-1], rope_dim)
    data, scales = records.split((record.data_bytes, record.scale_bytes), dim=-1)
    return _kv_values(record, data, scales, dtype)


def kv_page_pack(kv: Tensor, rope_dim: int = ROPE_DIM) -> Tensor:
    """Write pages: kv [..., N, C] -> uint8 [..., page_bytes], one page for each N entries.

    N data parts, then N scale parts, then zeros up to a multiple of the data part.
    """
    data, scales = _kv_parts(kv, rope_dim)
    num_entries = kv.shape[-2]
    stride = KvRecord(kv.shape[-1], rope_dim).page_bytes(num_entries)
    page = torch.cat((data.flatten(-2), scales.flatten(-2)), dim=-1)
    return torch.nn.functional.pad(page, (0, stride - page.shape[-1]))


def kv_page_unpack(
    page: Tensor,
    num_entries: int,
    head_dim: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    rope_dim: int = ROPE_DIM,
) -> Tensor:
    """Read pages of `num_entries`: uint8 [..., page_bytes] -> `dtype` [..., N, head_dim]."""
    record = KvRecord(head_dim, rope_dim)
    _check_bytes("page", page, 1, record.page_bytes(num_entries))
    start, end = record.scale_offset(num_entries), num_entries * record.nbytes
    data = page[..., :start].unflatten(-1, (num_entries, record.data_bytes))
    scales = page[..., start:end].unflatten(-1, (num_entries, record.scale_bytes))
    return _kv_values(record, data, scales, dtype)


def index_record_pack_fp8(k: Tensor) -> Tensor:
    """Write index keys [..., S, J] as uint8 [..., S, J + 4]: E4M3, then one FP32 power of two."""
    return torch.cat(_index_parts(k, "fp8"), dim=-1)


def index_record_pack_mxfp4(k: Tensor) -> Tensor:
    """Write index keys [..., S, J] as uint8 [..., S, J/2 + J/32]: e2m1 pairs, then UE8M0 scales."""
    return torch.cat(_index_parts(k, "mxfp4"), dim=-1)


def index_record_unpack(
    records: Tensor, keys: IndexKeys, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Read index keys: uint8 [..., S, bytes] -> `dtype` [..., S, head_dim].

    unpack(pack(k)) is `simulate_index_fp8(k)` or `simulate_mxfp4(k)`.
    """
    record = IndexRecord(head_dim, keys)
    _check_bytes("records", records, 2, record.nbytes)
    values, scales = records.split((record.value_bytes, record.scale_bytes), dim=-1)
    return _index_values(record, values, scales, dtype)


def index_page_pack(k: Tensor, keys: IndexKeys) -> Tensor:
    """Write pages of index keys: k [..., N, J] -> uint8 [..., page_bytes]; values, then scales."""
    return torch.cat([part.flatten(-2) for part in _index_parts(k, keys)], dim=-1)


def index_page_unpack(
    page: Tensor,
    num_entries: int,
    keys: IndexKeys,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Read pages of index keys: uint8 [..., page_bytes] -> `dtype` [..., N, head_dim]."""
    record = IndexRecord(head_dim, keys)
    _check_bytes("page", page, 1, record.page_bytes(num_entries))
    start = record.scale_offset(num_entries)
    values = page[..., :start].unflatten(-1, (num_entries, record.value_bytes))
    scales = page[..., start:].unflatten(-1, (num_entries, record.scale_bytes))
    return _index_values(record, values, scales, dtype)


def _kv_parts(kv: Tensor, rope_dim: int) -> tuple[Tensor, Tensor]:
    """The data parts and the scale parts of records, uint8."""
    _check_values("kv", kv)
    record = KvRecord(kv.shape[-1], rope_dim)
    nope, rope = kv.split((record.nope_dim, rope_dim), dim=-1)
    value, scale = fp8_act_quantize(nope, SCALE_GROUP)
    data = torch.cat((_bytes(value), _bytes(rope.to(torch.bfloat16))), dim=-1)
    padding = record.scale_bytes - record.num_scales
    return data, torch.nn.functional.pad(_bytes(scale), (0, padding))


def _kv_values(record: KvRecord, data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    nope, rope = data.split((record.nope_dim, 2 * record.rope_dim), dim=-1)
    value = _from_bytes(nope, torch.float8_e4m3fn)
    scale = _from_bytes(scales[..., : record.num_scales], torch.float8_e8m0fnu)
    rope_values = _from_bytes(rope, torch.bfloat16).to(dtype)
    return torch.cat((fp8_act_dequantize(value, scale, dtype), rope_values), dim=-1)


def _index_parts(k: Tensor, keys: IndexKeys) -> tuple[Tensor, Tensor]:
    """The values and the scales of index keys, uint8."""
    _check_values("k", k)
    record = IndexRecord(k.shape[-1], keys)
    if record.keys == "mxfp4":
        packed, scale = mxfp4_act_quantize(k)
        return packed, _bytes(scale)
    value, scale = fp8_act_quantize(k, k.shape[-1])
    return _bytes(value), _bytes(e8m0_decode(scale))


def _index_values(
    record: IndexRecord, values: Tensor, scales: Tensor, dtype: torch.dtype
) -> Tensor:
    if record.keys == "mxfp4":
        return mxfp4_act_dequantize(values, _from_bytes(scales, torch.float8_e8m0fnu), dtype)
    value = _from_bytes(values, torch.float8_e4m3fn).to(torch.float32)
    return (value * _from_bytes(scales, torch.float32)).to(dtype)


def _bytes(x: Tensor) -> Tensor:
    # A view of another element size needs the strides and the alignment that a copy is sure of.
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _from_bytes(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(dtype)


def _kv_record_of_bytes(nbytes: int, rope_dim: int) -> KvRecord:
    """The record of `nbytes`; sizes grow with head_dim, so at most one fits."""
    head_dim = rope_dim + SCALE_GROUP
    while (record := KvRecord(head_dim, rope_dim)).nbytes < nbytes:
        head_dim += SCALE_GROUP
    if record.nbytes != nbytes:
        raise ValueError(
            f"records: expected the bytes of a record with rope_dim {rope_dim}, "
            f"such as {record.nbytes}, got {nbytes}"
        )
    return record


def _check_values(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"{name}: expected float32, float64 or bfloat16, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"{name}: expected at least 2 dims, got shape {list(x.shape)}")


def _check_bytes(name: str, x: Tensor, min_dim: int, nbytes: int | None = None) -> None:
    if x.dtype != torch.uint8:
        raise ValueError(f"{name}: expected torch.uint8, got {x.dtype}")
    if x.dim() < min_dim:
        raise ValueError(f"{name}: expected at least {min_dim} dims, got shape {list(x.shape)}")
    if nbytes is not None and x.shape[-1] != nbytes:
        raise ValueError(f"{name}: expected {nbytes} bytes in the last dim, got {x.shape[-1]}")
