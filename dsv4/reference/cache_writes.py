"""Oracles of the cache ops: what a step writes into rings, states and pages, and dense reads.

They change their tensors in place, as the ops do. Letters: T token rows of a step, W ring rows,
C dims of a KV record, R of them rotated, J of an index key, P pages, S compressed entries.

    slot            [T] int64  where the row's request keeps its state; -1 for padding, which writes
                               nothing
    position        [T] int64  of the token in its request
    end_position    [T] int64  length of the request after the step, without draft tokens that were
                               rejected: rows at or beyond it are not appended
    first_row       [T] int64  row of the request's first token in this step
    first_position  [T] int64  position of that token
    page_table      [slots, max_pages] int32  page of each `entries_per_page` entries; 0 is the null
                               page, which nothing is written to or read from
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.core.kv_layout import IndexKeys, IndexRecord, KvRecord
from dsv4.reference.compressor import pool_windows
from dsv4.reference.kv_records import (
    index_record_pack_fp8,
    index_record_pack_mxfp4,
    index_record_unpack,
    kv_record_pack,
    kv_record_unpack,
)
from dsv4.reference.norm import rms_norm
from dsv4.reference.precision import wide_dtype
from dsv4.reference.quant import hadamard
from dsv4.reference.rope import apply_rope


def kv_window_append(
    kv: Tensor, window: Tensor, slot: Tensor, position: Tensor, end_position: Tensor,
    rows: int, rope_dim: int,
) -> None:  # fmt: skip
    """Write window KV of new tokens as FP8 records; token p goes to row p mod `rows`.

    kv      [T, C] BF16 or FP32, after norm and RoPE
    window  [slots, stride] uint8, changed: a page of `rows` records for each slot

    Of a chunk longer than the ring only the last `rows` tokens are written.
    """
    chosen = _ring_writers(slot, position, end_position, rows)
    records = kv_record_pack(kv[chosen], rope_dim)
    record = KvRecord(kv.shape[1], rope_dim)
    _scatter_records(
        window, slot[chosen], position[chosen] % rows, rows, record.data_bytes, records
    )


def compressor_insert(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor, sin: Tensor,
    pages: Tensor, page_table: Tensor, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, ratio: int, entries_per_page: int, eps: float, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Write the entry of every window that a token of this step completes, as an FP8 record.

    kappa, gamma  [T, width] FP32 value and score rows, position bias added; width 2C overlaps
    state         [slots, 2, rows, width] FP32 as the step before left it: token p is row p mod rows
    norm          [C] weight of the RMSNorm
    cos, sin      [S, R/2] FP32; row w is for position w * ratio
    pages         [P, stride] uint8, changed
    dtype         what the model computes in: pooling, norm and RoPE each round to it

    Entry w = p // ratio of the last token p goes to page page_table[slot, w // entries_per_page].
    Draft tokens take part: the entry of one that is rejected lies beyond the request's length, and
    the token that takes its place writes it again.
    """
    chosen, x = compressed_entries(
        kappa, gamma, state, norm, cos, sin, slot, position, first_row, first_position, ratio,
        eps, dtype,
    )  # fmt: skip
    entry = position[chosen] // ratio
    page, row = _entry_rows(page_table, slot[chosen], entry, entries_per_page)
    record = KvRecord(norm.shape[0], 2 * cos.shape[1])
    records = kv_record_pack(x, record.rope_dim)
    _scatter_records(pages, page, row, entries_per_page, record.data_bytes, records, null_page=0)


def index_key_insert(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor, sin: Tensor,
    pages: Tensor, page_table: Tensor, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, ratio: int, entries_per_page: int, eps: float, dtype: torch.dtype,
    keys: IndexKeys, is_rotated: bool,
) -> None:  # fmt: skip
    """Write the indexer's key of every window that a token of this step completes.

    As compressor_insert with J for C. keys "fp8" or "mxfp4"; is_rotated: Hadamard before the cast.
    """
    chosen, x = compressed_entries(
        kappa, gamma, state, norm, cos, sin, slot, position, first_row, first_position, ratio,
        eps, dtype,
    )  # fmt: skip
    x = hadamard(x) if is_rotated else x
    entry = position[chosen] // ratio
    page, row = _entry_rows(page_table, slot[chosen], entry, entries_per_page)
    records = index_record_pack_fp8(x) if keys == "fp8" else index_record_pack_mxfp4(x)
    size = IndexRecord(norm.shape[0], keys).value_bytes
    _scatter_records(pages, page, row, entries_per_page, size, records, null_page=0)


def entry_and_key_insert(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, pages: Tensor,
    index_kappa: Tensor, index_gamma: Tensor, index_state: Tensor, index_norm: Tensor,
    index_pages: Tensor, cos: Tensor, sin: Tensor, page_table: Tensor, slot: Tensor,
    position: Tensor, first_row: Tensor, first_position: Tensor, ratio: int,
    entries_per_page: int, eps: float, dtype: torch.dtype, keys: IndexKeys, is_rotated: bool,
) -> None:  # fmt: skip
    """compressor_insert, then index_key_insert of the same windows (CSA).

    Names that begin with "index_" are of the keys; the others of the entries, or of both. Either
    both overlap or neither.
    """
    angles, at = (cos, sin), (page_table, slot, position, first_row, first_position)
    sizes = ratio, entries_per_page, eps, dtype
    compressor_insert(kappa, gamma, state, norm, *angles, pages, *at, *sizes)
    own = index_kappa, index_gamma, index_state, index_norm
    index_key_insert(*own, *angles, index_pages, *at, *sizes, keys, is_rotated)


def compressed_entries(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor, sin: Tensor,
    slot: Tensor, position: Tensor, first_row: Tensor, first_position: Tensor, ratio: int,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Entries that the tokens of a step complete, after norm and RoPE, before any cast to records.

    -> rows [n] of the tokens that complete a window, in order; entries [n, C] in `dtype`

    FP64 arguments and dtype give the exact result.
    """
    rows, width = state.shape[2:]
    chosen = ((slot >= 0) & ((position + 1) % ratio == 0)).nonzero().squeeze(1)
    window = torch.arange(rows, device=position.device) - rows + 1
    at = position[chosen, None] + window  # [n, rows]
    is_new = (at >= first_position[chosen, None])[..., None]
    step_row = (first_row[chosen, None] + at - first_position[chosen, None]).clamp(min=0)
    step_row = step_row.clamp(max=max(len(kappa) - 1, 0))
    ring = state[slot[chosen, None], :, at % rows]  # [n, rows, 2, width]
    absent = (at < 0)[..., None]
    values = torch.where(is_new, kappa[step_row], ring[:, :, 0]).masked_fill(absent, 0)
    scores = torch.where(is_new, gamma[step_row], ring[:, :, 1]).masked_fill(absent, -torch.inf)
    if width != norm.shape[0]:
        values, scores = _overlap(values, ratio), _overlap(scores, ratio)
    x = rms_norm(pool_windows(values, scores).to(dtype), norm, eps)
    entry = position[chosen] // ratio
    angles = (table[entry].to(wide_dtype(dtype)) for table in (cos, sin))
    return chosen, apply_rope(x, *angles)


def compressor_state_append(
    kappa: Tensor, gamma: Tensor, state: Tensor, slot: Tensor, position: Tensor,
    end_position: Tensor,
) -> None:  # fmt: skip
    """Keep the rows of new tokens for later windows; token p goes to row p mod rows.

    kappa, gamma  [T, width] FP32
    state         [slots, 2, rows, width] FP32, changed

    Of a chunk longer than the ring only the last `rows` tokens are written. It comes after
    compressor_insert and index_key_insert, which need the rows it overwrites.
    """
    rows = state.shape[2]
    chosen = _ring_writers(slot, position, end_position, rows)
    at = (slot[chosen], slice(None), position[chosen] % rows)
    state[at] = torch.stack((kappa[chosen], gamma[chosen]), dim=1)


def cache_step_append(
    kv: Tensor, window: Tensor, kappa: Tensor | None, gamma: Tensor | None, state: Tensor | None,
    index_kappa: Tensor | None, index_gamma: Tensor | None, index_state: Tensor | None,
    slot: Tensor, position: Tensor, end_position: Tensor, rows: int, rope_dim: int,
) -> None:  # fmt: skip
    """All that a step leaves in the rings of a layer; it comes after the layer's attention.

    kv, window           as in kv_window_append
    kappa, gamma, state  as in compressor_state_append: of entries, and of index keys where the
                         names begin with "index_"; None where a layer has none
    """
    kv_window_append(kv, window, slot, position, end_position, rows, rope_dim)
    for group in ((kappa, gamma, state), (index_kappa, index_gamma, index_state)):
        k, g, s = group
        if k is not None and g is not None and s is not None:
            compressor_state_append(k, g, s, slot, position, end_position)


def cache_reset(state: Tensor, slot: Tensor) -> None:
    """Make compressor state what it is before the first token: kappa 0, gamma -inf.

    state  [slots, 2, rows, width] FP32, changed
    slot   [B] int64, -1 for none. Window rings need no reset: a row is read only once written.
    """
    chosen = slot[slot >= 0]
    state[chosen, 0] = 0
    state[chosen, 1] = -torch.inf


def gather_window(
    window: Tensor, slot: Tensor, position: Tensor, rows: int, head_dim: int, rope_dim: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Dense window rows: token `position` [N] of `slot` [N] -> [N, head_dim] in `dtype`.

    Rows with slot or position -1 are zeros. A position must still be in the ring.
    """
    record = KvRecord(head_dim, rope_dim)
    page = torch.where(position >= 0, slot, -1)
    parts = record.data_bytes, record.scale_bytes
    records = gather_records(window, page, position % rows, rows, *parts)
    return _or_zero(kv_record_unpack(records, dtype, rope_dim), page >= 0)


def gather_entries(
    pages: Tensor, page_table: Tensor, slot: Tensor, entry: Tensor, entries_per_page: int,
    head_dim: int, rope_dim: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Dense compressed entries: `entry` [N] of `slot` [N] -> [N, head_dim] in `dtype`.

    Rows with slot or entry -1, or on the null page, are zeros.
    """
    record = KvRecord(head_dim, rope_dim)
    page, row = _entry_rows(page_table, slot, entry, entries_per_page)
    page = torch.where(page > 0, page, -1)
    parts = record.data_bytes, record.scale_bytes
    records = gather_records(pages, page, row, entries_per_page, *parts)
    return _or_zero(kv_record_unpack(records, dtype, rope_dim), page >= 0)


def gather_index_keys(
    pages: Tensor, page_table: Tensor, slot: Tensor, entry: Tensor, entries_per_page: int,
    head_dim: int, keys: IndexKeys, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Dense indexer keys: `entry` [N] of `slot` [N] -> [N, head_dim] in `dtype`.

    Rows with slot or entry -1, or on the null page, are zeros.
    """
    record = IndexRecord(head_dim, keys)
    page, row = _entry_rows(page_table, slot, entry, entries_per_page)
    page = torch.where(page > 0, page, -1)
    parts = record.value_bytes, record.scale_bytes
    records = gather_records(pages, page, row, entries_per_page, *parts)
    return _or_zero(index_record_unpack(records, keys, head_dim, dtype), page >= 0)


def gather_records(
    store: Tensor, page: Tensor, row: Tensor, num_rows: int, value_bytes: int, scale_bytes: int
) -> Tensor:
    """Raw records, the value part and the scale part joined.

    store      [P, stride] uint8: pages, or window rings with a slot as the page
    page, row  [N] int64; page -1 gives zeros
    ->         [N, value_bytes + scale_bytes] uint8
    """
    at = _record_bytes(row, num_rows, value_bytes, scale_bytes)
    live = (page >= 0) & (row >= 0)
    source = store[torch.where(live, page, 0)[:, None], torch.where(live[:, None], at, 0)]
    return _or_zero(source, live)


def _overlap(rows: Tensor, ratio: int) -> Tensor:
    """[n, 2r, 2C] -> [n, 2r, C]: first half of the previous window, second half of this one."""
    C = rows.shape[-1] // 2
    return torch.cat((rows[:, :ratio, :C], rows[:, ratio:, C:]), dim=1)


def _ring_writers(slot: Tensor, position: Tensor, end_position: Tensor, rows: int) -> Tensor:
    is_last = (position < end_position) & (position >= end_position - rows)
    return ((slot >= 0) & is_last).nonzero().squeeze(1)


def _entry_rows(
    page_table: Tensor, slot: Tensor, entry: Tensor, entries_per_page: int
) -> tuple[Tensor, Tensor]:
    """Page and row of each entry; the null page where there is none."""
    index = entry // entries_per_page
    inside = (slot >= 0) & (entry >= 0) & (index < page_table.shape[1])
    page = page_table[torch.where(inside, slot, 0), torch.where(inside, index, 0)].to(torch.int64)
    return torch.where(inside, page, 0), entry % entries_per_page


def _record_bytes(row: Tensor, num_rows: int, value_bytes: int, scale_bytes: int) -> Tensor:
    """Offsets in a page of every byte of each record, [N, value_bytes + scale_bytes]."""
    value = row[:, None] * value_bytes + torch.arange(value_bytes, device=row.device)
    scale = row[:, None] * scale_bytes + torch.arange(scale_bytes, device=row.device)
    return torch.cat((value, num_rows * value_bytes + scale), dim=1)


def _scatter_records(
    store: Tensor, page: Tensor, row: Tensor, num_rows: int, value_bytes: int, records: Tensor,
    null_page: int = -1,
) -> None:  # fmt: skip
    at = _record_bytes(row, num_rows, value_bytes, records.shape[1] - value_bytes)
    live = page > null_page
    store[page[live, None], at[live]] = records[live]


def _or_zero(x: Tensor, live: Tensor) -> Tensor:
    return torch.where(live[:, None], x, torch.zeros_like(x))
