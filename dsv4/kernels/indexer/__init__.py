"""Scores of compressed entries and the choice of the best of them.

*_sm90: on Hopper, with the choice in CUDA C++ and scores in Triton; without a suffix: Triton, GPUs
from SM 9.0 and the interpreter. The model runs indexer_scores_topk; topk_select is its choice.
"""

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
