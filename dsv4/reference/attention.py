"""Core attention: one softmax over window keys and compressed entries, with a sink."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.reference.precision import wide

QUERY_CHUNK = 64  # queries whose keys are gathered at once; bounds memory, changes no result


def window_indices(positions: Tensor, first_position: int, window: int) -> Tensor:
    """Rows of the window keys that each query sees: itself and the window - 1 tokens before it.

    positions      [T] absolute positions of the queries
    first_position absolute position of row 0 of the window keys
    ->             [T, window] int64, oldest first, -1 where the sequence had not begun
    """
    offsets = torch.arange(1 - window, 1, device=positions.device)
    seen = positions[:, None] + offsets[None, :]
    return torch.where(seen >= 0, seen - first_position, -1)


def visible_entries(positions: Tensor, ratio: int) -> Tensor:
    """How many compressed entries each query sees: those whose last token is not after it.

        entry w is visible to t iff w < (t + 1) // ratio

    positions [T] -> [T] int64. The entry that the query's own token completes is visible to it.
    """
    return torch.div(positions + 1, ratio, rounding_mode="floor")


def all_entries_indices(visible: Tensor, num_entries: int) -> Tensor:
    """Every visible entry, for HCA.

    visible [T] -> [T, num_entries] int64, -1 beyond the visible ones
    """
    entry = torch.arange(num_entries, device=visible.device)[None, :].expand(len(visible), -1)
    return torch.where(entry < visible[:, None], entry, -1)


def sparse_attn(q: Tensor, kv: Tensor, indices: Tensor, sink: Tensor, scale: float) -> Tensor:
    """Attend from each query to a set of rows that serve as both key and value.

        o_h = sum_j e^{l_hj - m_h} v_j / (sum_j e^{l_hj - m_h} + e^{sink_h - m_h}),
        l_hj = scale q_h . v_j,   m_h = max_j l_hj            (paper sec. 2.3.3)

    q       [T, H, C] after RoPE
    kv      [S, C]    window keys and compressed entries together
    indices [T, K]    rows of kv each query sees; -1 is skipped. Order does not matter.
    sink    [H]       logit that only enters the denominator; `scale` does not touch it
    scale   C^-0.5, without a YaRN factor
    ->      [T, H, C] in q's dtype. Softmax in FP32; the numerators are rounded to q's dtype before
            the product with V, the denominator sums the unrounded ones. A query without any row
            gives zeros.
    """
    parts = [
        _sparse_attn_chunk(q_c, kv, idx_c, sink, scale)
        for q_c, idx_c in zip(q.split(QUERY_CHUNK), indices.split(QUERY_CHUNK), strict=True)
    ]
    return torch.cat(parts) if parts else q.new_zeros(q.shape)


def _sparse_attn_chunk(
    q: Tensor, kv: Tensor, indices: Tensor, sink: Tensor, scale: float
) -> Tensor:
    skipped_TK = indices < 0
    kv_TKC = wide(kv[indices.clamp(min=0)])
    logits_THK = wide(q) @ kv_TKC.transpose(1, 2) * scale
    logits_THK = logits_THK.masked_fill(skipped_TK[:, None, :], float("-inf"))
    m_TH1 = logits_THK.amax(dim=-1, keepdim=True)
    m_TH1 = torch.where(m_TH1.isinf(), wide(sink)[None, :, None], m_TH1)  # nothing to attend to
    p_THK = (logits_THK - m_TH1).exp()
    denominator = p_THK.sum(dim=-1, keepdim=True) + (wide(sink)[None, :, None] - m_TH1).exp()
    return ((wide(p_THK.to(q.dtype)) / denominator) @ kv_TKC).to(q.dtype)
