"""Oracles of the indexer ops: scores of keys read from pages, and the top k of them.

Letters: T token rows of a step, I indexer heads, J dims of an index key, S entries, K the most
that are chosen, P pages. `slot` and `page_table` are those of dsv4.reference.cache_writes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4.core.kv_layout import IndexKeys
from dsv4.reference.attention import visible_entries
from dsv4.reference.cache_writes import gather_index_keys
from dsv4.reference.indexer import indexer_scores, indexer_topk
from dsv4.reference.precision import wide_dtype
from dsv4.reference.rope import apply_rope
from dsv4.reference.simulation import QuantSimulation


def topk_select(scores: Tensor, lengths: Tensor, topk: int) -> Tensor:
    """Places of the `topk` best scores of each row; ties go to the lower place.

    scores   [T, S] FP32 (or FP64); NaN counts as -inf, and -0 as 0
    lengths  [T] int64; row t has the first lengths[t] scores, at least 0 and at most S
    ->       [T, topk] int32, ascending, -1 after the last: min(topk, lengths[t]) places a row
    """
    place = torch.arange(scores.shape[1], device=scores.device)
    is_dead = scores.isnan() | (place[None, :] >= lengths[:, None])
    chosen = indexer_topk(scores.masked_fill(is_dead, float("-inf")), lengths, topk)
    return pad(chosen, (0, topk - chosen.shape[1]), value=-1).to(torch.int32)


def indexer_scores_topk(
    q: Tensor, head_weights: Tensor, pages: Tensor, page_table: Tensor, slot: Tensor,
    position: Tensor, ratio: int, entries_per_page: int, topk: int, keys: IndexKeys,
    is_rotated: bool, is_rounded: bool, cos: Tensor | None = None, sin: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The entries each query attends to, from index keys in pages.

        I(t, w) = sum_h u_h ReLU(q^I_h . k_w),   S_t = top-k_w I(t, w)      (paper eqs. 13-17)

    q             [T, I, J] after RoPE, or before it where cos and sin are given
    head_weights  [T, I] FP32
    pages         [P, stride] uint8, index keys in the format `keys`
    page_table    [slots, max_pages] int32; a wider table than in use costs time, so narrow it
    slot          [T] int64, -1 for padding
    position      [T] int64 of the query; it sees min((position + 1) // ratio, entries that the
                  table has room for)
    is_rotated    whether the query takes the Hadamard transform here, as the keys did
    is_rounded    whether the query is rounded here to the format of the keys
    cos, sin      [positions, R/2] FP32: the last R dims of each head take their RoPE here, and are
                  rounded to q's dtype
    ->            [T, topk] int32, ascending, -1 after the last: min(topk, visible) entries a row,
                  and none for padding. Ties go to the lower index.
    """
    dtype = wide_dtype(q.dtype)
    chosen = torch.full((len(q), topk), -1, dtype=torch.int32, device=q.device)
    if cos is not None and sin is not None:
        q = apply_rope(q, *(table[position].to(dtype) for table in (cos, sin)))
    query = round_query(q, keys, is_rotated, is_rounded)
    visible = paged_visible(slot, position, ratio, page_table.shape[1] * entries_per_page)
    for s in slot[visible > 0].unique():
        rows = (slot == s) & (visible > 0)
        entry = torch.arange(int(visible[rows].max()), device=q.device)
        at = s.expand(len(entry)), entry, entries_per_page
        keys_SJ = gather_index_keys(pages, page_table, *at, q.shape[2], keys, dtype)
        scores = indexer_scores(query[rows], keys_SJ, head_weights[rows], visible[rows])
        chosen[rows] = topk_select(scores, visible[rows], topk)
    return chosen


def round_query(q: Tensor, keys: IndexKeys, is_rotated: bool, is_rounded: bool) -> Tensor:
    """What the scores see of a query: `QuantSimulation.round_index`, each half optional."""
    indexer = keys if is_rounded else "none"
    return QuantSimulation(indexer=indexer, hadamard=is_rotated).round_index(q)


def paged_visible(slot: Tensor, position: Tensor, ratio: int, capacity: int) -> Tensor:
    """Entries each query sees, [T] int64: none for padding, no more than the table holds."""
    visible = visible_entries(position, ratio).clamp(0, capacity)
    return torch.where(slot >= 0, visible, 0)
