"""Indexer ops, registered as torch.ops.dsv4.*; what each does is said by its oracle."""

import torch
from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.op import dsv4_op
from dsv4.kernels import indexer as kernels

# Best first.
INDEXER_SCORES_TOPK = (kernels.indexer_scores_topk_sm90.SPEC, kernels.indexer_scores_topk.SPEC)
TOPK_SELECT = (kernels.topk_select_sm90.SPEC, kernels.topk_select.SPEC)


def _entries(x: Tensor, topk: int) -> Tensor:
    """The result of both ops; the rest of what `outputs` gives is scratch."""
    return x.new_empty((x.shape[0], topk), dtype=torch.int32)


@dsv4_op(fake=lambda scores, lengths, topk: _entries(scores, topk))
def topk_select(scores: Tensor, lengths: Tensor, topk: int) -> Tensor:
    """See dsv4.reference.paged_indexer.topk_select."""
    out = kernels.topk_select.outputs(scores, lengths, topk)
    select(TOPK_SELECT, scores.device).launch(scores, lengths, topk, out)
    return out[0]


def _fake_scores_topk(
    q: Tensor, head_weights: Tensor, pages: Tensor, page_table: Tensor, slot: Tensor,
    position: Tensor, ratio: int, entries_per_page: int, topk: int, keys: str,
    is_rotated: bool, is_rounded: bool, cos: Tensor | None = None, sin: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _entries(q, topk)


@dsv4_op(fake=_fake_scores_topk)
def indexer_scores_topk(
    q: Tensor, head_weights: Tensor, pages: Tensor, page_table: Tensor, slot: Tensor,
    position: Tensor, ratio: int, entries_per_page: int, topk: int, keys: str,
    is_rotated: bool, is_rounded: bool, cos: Tensor | None = None, sin: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See dsv4.reference.paged_indexer.indexer_scores_topk."""
    args = (
        q, head_weights, pages, page_table, slot, position, ratio, entries_per_page, topk, keys,
        is_rotated, is_rounded, cos, sin,
    )  # fmt: skip
    out = kernels.indexer_scores_topk.outputs(*args)
    select(INDEXER_SCORES_TOPK, q.device).launch(*args, out)
    return out[0]
