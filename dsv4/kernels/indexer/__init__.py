"""Scores of compressed entries and the choice of the best of them."""

from dsv4.kernels.indexer import (
    indexer_scores_topk,
    indexer_scores_topk_sm90,
    topk_select,
    topk_select_sm90,
)

__all__ = [
    "indexer_scores_topk",
    "indexer_scores_topk_sm90",
    "topk_select",
    "topk_select_sm90",
]
