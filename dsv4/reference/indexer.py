"""Lightning indexer oracles: score every compressed entry cheaply, keep the top k (CSA only)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.reference.linear import linear
from dsv4.reference.precision import wide

QUERY_CHUNK = 64  # queries scored at once; bounds memory, changes no result


def indexer_query(
    latent: Tensor, wq_b: Tensor, num_heads: int, simulate_activation: bool = False
) -> Tensor:
    """Query heads of the indexer, from the latent that the attention heads share.

        q^I_h = W^IUQ_h c^Q                                             (paper eqs. 13-17)

    latent [T, L], wq_b [I J, L] -> [T, I, J], before RoPE. There is no head norm.
    """
    return linear(latent, wq_b, simulate_activation).unflatten(-1, (num_heads, -1))


def indexer_head_weights(x: Tensor, weights_proj: Tensor, head_dim: int) -> Tensor:
    """Weight of each indexer head, from the hidden state (not from the latent).

        u = W^w h / sqrt(J I)                                               (paper eqs. 13-17)

    x [T, D], weights_proj [I, D] -> [T, I] FP32
    """
    return wide(linear(x, weights_proj)) * (head_dim * weights_proj.shape[0]) ** -0.5


def indexer_scores(q: Tensor, keys: Tensor, head_weights: Tensor, visible: Tensor) -> Tensor:
    """Score of each entry for each query.

        I(t, w) = sum_h u_h ReLU(q^I_h . k_w)                               (paper eqs. 13-17)

    q            [T, I, J] after RoPE
    keys         [S, J]
    head_weights [T, I] FP32
    visible      [T] number of entries each query may see
    ->           [T, S] FP32, -inf for entries that are not visible
    """
    keys_JS = wide(keys).T
    chunks = zip(q.split(QUERY_CHUNK), head_weights.split(QUERY_CHUNK), strict=True)
    scores_TS = torch.cat(
        [(u_TI[:, None, :] @ (wide(q_TIJ) @ keys_JS).relu()).squeeze(1) for q_TIJ, u_TI in chunks]
    )
    entry = torch.arange(len(keys), device=keys.device)
    return scores_TS.masked_fill(entry[None, :] >= visible[:, None], float("-inf"))


def indexer_topk(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """The k best visible entries of each query; ties go to the lower index.

        S_t = top-k_w I(t, w)                                               (paper eqs. 13-17)

    scores  [T, S], visible [T]
    ->      [T, min(k, S)] int64, ascending, -1 after the last. Real ties occur: a query whose ReLU
            terms are all zero scores every entry 0.

    Raises ValueError where a score is NaN: every query gets min(k, visible) entries or none runs.
    """
    if bool(scores.isnan().any()):
        raise ValueError("scores: expected numbers, got NaN; the indexer would select nothing")
    num_entries = scores.shape[1]
    k = min(k, num_entries)
    if k == 0:
        return torch.full((len(scores), 0), -1, dtype=torch.int64, device=scores.device)
    threshold = scores.topk(k, dim=1).values[:, -1:]
    above, tied = scores > threshold, scores == threshold
    room = k - above.sum(dim=1, keepdim=True)
    entry = torch.arange(num_entries, device=scores.device)[None, :]
    chosen = (above | (tied & (tied.cumsum(dim=1) <= room))) & (entry < visible[:, None])
    slot = torch.where(chosen, chosen.cumsum(dim=1) - 1, k)  # column k takes what is not chosen
    out = torch.full((len(scores), k + 1), -1, dtype=torch.int64, device=scores.device)
    return out.scatter_(1, slot, entry.expand_as(slot))[:, :k]
