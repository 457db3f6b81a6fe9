"""Oracles of the attention kernels: unpack the records a query sees, then `sparse_attn`.

Letters: T token rows of a step, H heads, C dims of a KV record, R of them rotated, W ring rows,
P pages, K chosen entries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4.reference.attention import sparse_attn, visible_entries
from dsv4.reference.cache_writes import gather_entries, gather_window
from dsv4.reference.kv_records import kv_page_pack, kv_page_unpack
from dsv4.reference.norm import rms_norm
from dsv4.reference.precision import wide_dtype
from dsv4.reference.quant import fp8_act_quantize
from dsv4.reference.rope import apply_rope


def kv_step_pack(kv: Tensor, rope_dim: int) -> Tensor:
    """Write the KV rows of a step as one page of T records.

    kv [T, C] BF16 or FP32, after norm and RoPE -> uint8 [page_bytes(T)]; nothing for T = 0

    Attention reads the step's own tokens from it, so that it sees the bytes that the ring will
    hold, and the ring is written after attention.
    """
    return kv_page_pack(kv, rope_dim) if len(kv) else kv.new_empty(0, dtype=torch.uint8)


def latent_kv_norm_pack(
    x: Tensor, q_norm: Tensor, kv_norm: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Everything between the joined projection wq_a | wkv and what reads it.

    x         [T, L + C]  latent of the query, then the KV row
    q_norm    [L], kv_norm [C] weights of the RMSNorms
    cos, sin  [S, R/2] FP32; row p is for position p
    position  [T] int64
    ->        latent [T, L] after its norm, kv [T, C] after norm and RoPE, kv_step_pack of it
    """
    L = len(q_norm)
    latent, kv = rms_norm(x[:, :L], q_norm, eps), rms_norm(x[:, L:], kv_norm, eps)
    angles = (table[position].to(wide_dtype(x.dtype)) for table in (cos, sin))
    kv = apply_rope(kv, *angles)
    return latent, kv, kv_step_pack(kv, 2 * cos.shape[1])


def sparse_attn_decode(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
) -> Tensor:  # fmt: skip
    """Attend from each token of a step to its window and to compressed entries, in one softmax.

    q               [T, H, C] after RoPE
    step            uint8, a page of T records: KV of this step's tokens, row t for q[t]
    window          [slots, stride] uint8, rings of W = `rows` records as the step before left them
    pages           [P, stride] uint8, pages of `entries_per_page` records
    page_table      [slots, max_pages] int32; 0 is the null page. No columns: a layer of SWA
    entries         [T, K] int32 or int64, values of 32 bits: entries that each token sees, in any
                    order (CSA); -1 is skipped, and so is an entry that is not visible. None: all
                    visible ones (HCA)
    slot            [T] int64; -1 for padding, whose output is 0
    position        [T] int64 of the token in its request
    first_row       [T] int64  row of the request's first token in this step
    first_position  [T] int64  its position; keys from there on are taken from `step`
    sink            [H] FP32, joins the denominator, not scaled
    cos, sin        [T, R/2] FP32: rotate the output back; None leaves it as it is
    ratio           tokens of an entry: entry w is visible to t iff w < (t + 1) // ratio
    ->              [T, H, C] in q's dtype; 0 where a token sees no key

    Tokens of one request, of several, in any number and order: each row is on its own.
    """
    T, _, C = q.shape
    out = torch.zeros_like(q)
    for t in range(T):
        if slot[t] < 0:
            continue
        keys = _window_keys(
            step, window, slot[t], position[t], first_row[t], first_position[t], T, rows, C,
            rope_dim, q.dtype,
        )  # fmt: skip
        seen = _seen_entries(entries, t, position[t], page_table, ratio, entries_per_page)
        page = page_table[slot[t], seen // entries_per_page]
        seen = seen[page > 0]
        compressed = gather_entries(
            pages, page_table, slot[t].expand(len(seen)), seen, entries_per_page, C, rope_dim,
            q.dtype,
        )  # fmt: skip
        kv = torch.cat((keys, compressed))
        indices = torch.arange(len(kv), device=q.device)[None]
        # sparse_attn takes its maximum over at least one column.
        out[t] = sparse_attn(q[t : t + 1], pad(kv, (0, 0, 0, 1)), pad(indices, (0, 1), value=-1),
                             sink, scale)[0]  # fmt: skip
    if cos is not None and sin is not None:
        angles = (x.to(wide_dtype(q.dtype)) for x in (cos, sin))
        out = apply_rope(out, *angles, inverse=True)
    return out


def sparse_attn_prefill(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
) -> Tensor:  # fmt: skip
    """The same as sparse_attn_decode, for chunks of prompts: thousands of tokens."""
    return sparse_attn_decode(
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, rope_dim, ratio, entries_per_page,
    )  # fmt: skip


def sparse_attn_decode_fp8(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sparse_attn_decode, then FP8 with a UE8M0 scale 128 dims of a head: W8A8 for wo_a.

    ->  float8_e4m3fn [T, H, C],  float8_e8m0fnu [T, H, C/128]

    Serving engines round the input of wo_a. The official code and the model here do not (W8A16).
    """
    out = sparse_attn_decode(
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, rope_dim, ratio, entries_per_page,
    )  # fmt: skip
    return fp8_act_quantize(out)


def sparse_attn_prefill_fp8(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same as sparse_attn_decode_fp8, for chunks of prompts."""
    return sparse_attn_decode_fp8(
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, rope_dim, ratio, entries_per_page,
    )  # fmt: skip


def _window_keys(
    step: Tensor, window: Tensor, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, num_rows: int, rows: int, C: int, rope_dim: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    at = torch.arange(rows, device=step.device) + position - rows + 1
    at = at[at >= 0]
    old, new = at[at < first_position], at[at >= first_position]
    ring = gather_window(window, slot.expand(len(old)), old, rows, C, rope_dim, dtype)
    own = kv_page_unpack(step, num_rows, C, dtype, rope_dim)[first_row + new - first_position]
    return torch.cat((ring, own))


def _seen_entries(
    entries: Tensor | None, t: int, position: Tensor, page_table: Tensor, ratio: int,
    entries_per_page: int,
) -> Tensor:  # fmt: skip
    capacity = page_table.shape[1] * entries_per_page
    visible = int(visible_entries(position, ratio).clamp(max=capacity))
    if entries is None:
        return torch.arange(visible, device=page_table.device)
    chosen = entries[t].to(torch.int64)
    return chosen[(chosen >= 0) & (chosen < visible)]
