"""The sampler over a batch: dsv4.reference.sampler.sample for every row."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.core.sampling import MAX_SEED, SamplingParams
from dsv4.reference import sampler


def sample(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor,
    top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Choose the next token of every request.

    logits       [B, V] FP32 or BF16; NaN counts as -inf
    temperature  [B] FP32; 0 is greedy: the largest logit, the lowest id of several
    seed         [B] int64, the bits of an unsigned number
    position     [B] int64 of the token that is drawn, prompt included
    top_k        [B] int32; 0 keeps all. None: no request has this filter, as for the next two
    top_p        [B] FP32; 1 keeps all
    min_p        [B] FP32; 0 drops nothing
    ->           [B] int64, each 0 to V - 1

    A row without a logit above -inf gives 0, whatever its parameters: whoever must know checks
    the logits.
    """
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    ids = []
    for b, row in enumerate(logits):
        own = {name: x[b].item() for name, x in filters.items() if x is not None}
        params = SamplingParams(temperature=temperature[b].item(), **own)
        rng = sampler.TokenRng(int(seed[b]) & MAX_SEED, int(position[b]))
        is_live = bool((row > -torch.inf).any())
        ids.append(sampler.sample(row, params, rng) if is_live else 0)
    return torch.tensor(ids, dtype=torch.int64, device=logits.device)
