"""The portable queries and scores, and the choice of topk_select_sm90.cu."""

from __future__ import annotations

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common import cuda
from dsv4.kernels.indexer.indexer_scores_topk import (
    CONFIG,
    REFERENCE,
    indexer_scores_topk_kernel,
    launch_with,
    outputs,
)
from dsv4.kernels.indexer.topk_select_sm90 import launch_select, sources

__all__ = [
    "CONFIG",
    "REFERENCE",
    "SPEC",
    "indexer_scores_topk_kernel",
    "launch",
    "outputs",
    "sources",
]


def launch(
    q: Tensor, head_weights: Tensor, pages: Tensor, page_table: Tensor, slot: Tensor,
    position: Tensor, ratio: int, entries_per_page: int, topk: int, keys: str,
    is_rotated: bool, is_rounded: bool, cos: Tensor | None, sin: Tensor | None,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    launch_with(
        launch_select, q, head_weights, pages, page_table, slot, position, ratio,
        entries_per_page, topk, keys, is_rotated, is_rounded, cos, sin, out,
    )  # fmt: skip


SPEC = KernelSpec("indexer_scores_topk/sm90", launch, arch=(9,), requires=cuda.why_not)
