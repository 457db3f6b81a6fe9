"""Oracles of the router ops: a token's experts and their weights in one step, and expert lists.

Built from dsv4.reference.router. Letters: T tokens, E experts, K chosen a token, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.reference import router


def router_topk(
    logits: Tensor, bias: Tensor, k: int, scaling: float, is_padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Score layers: the experts of every token and their weights.

        s = sqrt(softplus(logits)),  ids = top-k of s + bias,  weights = scaling * s / sum(s)

    logits     [T, E]
    bias       [E] FP32
    is_padding [T] bool; rows that are no token: experts -1, weights 0. None: all are tokens
    ->         ids [T, k] int32, best first; weights [T, k]

    Ties go to the lower id. A NaN logit counts as the largest, as in a sort, so that it shows: the
    weights of its token become NaN and the ids stay in range.
    """
    scores = router.router_affinity(logits)
    ids = router.router_topk(scores, bias, k)
    weights = router.router_weights(scores, ids, scaling)
    if is_padding is not None:
        live = ~is_padding[:, None]
        ids, weights = torch.where(live, ids, -1), torch.where(live, weights, 0)
    return ids.to(torch.int32), weights


def router_hash(
    logits: Tensor, tid2eid: Tensor, token_ids: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Hash layers: the experts follow from the token's id, their weights from the logits.

    logits    [T, E]
    tid2eid   [V, K] int32 or int64, experts from 0 to E - 1
    token_ids [T] int64; one outside 0 .. V - 1 is padding: experts -1, weights 0
    ->        ids [T, K] int32, weights [T, K]
    """
    is_token = (token_ids >= 0) & (token_ids < tid2eid.shape[0])
    ids = router.router_hash(tid2eid.to(torch.int64), torch.where(is_token, token_ids, 0))
    weights = router.router_weights(router.router_affinity(logits), ids, scaling)
    live = is_token[:, None]
    return torch.where(live, ids, -1).to(torch.int32), torch.where(live, weights, 0)


def moe_align_capacity(num_rows: int, num_experts: int, block_size: int) -> int:
    """The most blocks that `num_rows` rows of `num_experts` experts can fill, in whole or part."""
    experts = min(num_experts, num_rows)
    return min(num_rows, (num_rows + experts * (block_size - 1)) // block_size)


def moe_align(
    experts: Tensor, first_expert: int, num_experts: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of a grouped product: (token, k) pairs sorted by expert, and blocks that cover them.

    experts      [T, K] int32; the pair of token t and choice k is row t * K + k
    first_expert, num_experts  the experts that are here; rows of others (and of -1) are left out
    block_size   rows of a tile
    ->  rows         [T * K] int32: row of each place, expert by expert, ascending within one; -1
                     past the last
        offsets      [num_experts + 1] int32: places of local expert e are offsets[e] to
                     offsets[e + 1] - 1
        block_expert [capacity] int32: local expert of each block; -1 past the last
        block_start  [capacity] int32: first place of each block; -1 past the last. A block ends
                     after block_size places or with its expert
        num_blocks   [1] int32
    """
    local = experts.flatten().to(torch.int64) - first_expert
    local = torch.where((local >= 0) & (local < num_experts), local, num_experts)
    counts = local.bincount(minlength=num_experts + 1)[:num_experts]
    ends = counts.cumsum(0)
    order, place = local.argsort(stable=True), torch.arange(len(local), device=local.device)
    rows = torch.where(place < counts.sum(), order, -1)

    blocks = -(-counts // block_size)
    block_expert = torch.arange(num_experts, device=local.device).repeat_interleave(blocks)
    first_block = (blocks.cumsum(0) - blocks)[block_expert]
    index = torch.arange(len(block_expert), device=local.device)
    block_start = (ends - counts)[block_expert] + (index - first_block) * block_size
    padding = moe_align_capacity(len(local), num_experts, block_size) - len(block_expert)
    results = (
        rows, torch.cat((ends.new_zeros(1), ends)), _pad(block_expert, padding),
        _pad(block_start, padding), blocks.sum()[None],
    )  # fmt: skip
    first, second, third, fourth, fifth = (x.to(torch.int32) for x in results)
    return first, second, third, fourth, fifth


def _pad(x: Tensor, count: int) -> Tensor:
    return torch.cat((x, x.new_full((count,), -1)))
