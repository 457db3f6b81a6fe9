"""Draws of the sampler against its oracle: which ones differ, and whether rounding explains it."""

from torch import Tensor

from dsv4.core.sampling import MAX_SEED, SamplingParams
from dsv4.reference.sampler import TokenRng, filter_logits
from dsv4.reference.sampling import sample

FILTERS = ("top_k", "top_p", "min_p")
# FP32 shares, each off by some 1e-7 of itself, move a sum of shares by less than this.
ROUNDING = 1e-6


def unexplained(logits: Tensor, got: Tensor, rows: dict[str, Tensor]) -> tuple[int, int]:
    """Rows that differ from the oracle, and those of them that rounding cannot explain.

    It can where the random number lies within ROUNDING of what the id stands for, or where the
    mass before a candidate lies that close to top_p, or its share to min_p.
    """
    want = sample(logits, **rows)
    differs = (got != want).nonzero().flatten().tolist()
    bad = 0
    for b in differs:
        own = {name: rows[name][b].item() for name in FILTERS if name in rows}
        params = SamplingParams(temperature=rows["temperature"][b].item(), **own)
        probs = filter_logits(logits[b], params)
        sums = probs.cumsum(0)
        u = TokenRng(int(rows["seed"][b]) & MAX_SEED, int(rows["position"][b])).uniform()
        i = int(got[b])
        is_near = sums[i] - probs[i] - ROUNDING <= u <= sums[i] + ROUNDING
        bad += not (is_near and probs[i] > 0) and not is_edge(logits[b], params)
    return len(differs), bad


def is_edge(row: Tensor, params: SamplingParams) -> bool:
    """Whether a filter's limit lies within rounding of a token."""
    loose, tight = (
        SamplingParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=min(1.0, params.top_p * (1 + side * ROUNDING)),
            min_p=min(1.0, params.min_p * (1 - side * ROUNDING)),
        )
        for side in (1, -1)
    )
    kept = [int(filter_logits(row, p).count_nonzero()) for p in (loose, tight)]
    return kept[0] != kept[1]
