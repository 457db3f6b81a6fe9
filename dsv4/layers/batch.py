"""What one forward step works on: the argument of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.cache.step import StepRows
from dsv4.core.config import LayerKind
from dsv4.layers.rope import RopeTables


@dataclass(frozen=True)
class Batch:
    """T token rows of a step.

    ids         [T] int64; -1 for padding
    rows        where each row's request keeps its state, as the cache's step says
    page_table  [num_slots, max_pages] int32
    no_pages    [num_slots, 0]: the page table of a layer without entries
    ropes       tables of every position
    angles      kind -> cos, sin [T, R/2] FP32 of the rows' positions
    is_prefill  whether requests have many rows: it picks the attention kernel. A step is all
                prefill or all decode, so that a row's bits do not depend on its neighbours
    is_padding  [T] bool: rows that must not touch anything
    page_tokens original tokens of a page
    dtype       of activations
    """

    ids: Tensor
    rows: StepRows
    page_table: Tensor
    no_pages: Tensor
    ropes: RopeTables
    angles: Mapping[LayerKind, tuple[Tensor, Tensor]]
    is_prefill: bool
    is_padding: Tensor
    page_tokens: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, ids: Tensor, rows: StepRows, page_table: Tensor, ropes: RopeTables, page_tokens: int,
        is_prefill: bool, dtype: torch.dtype = torch.bfloat16,
    ) -> Batch:  # fmt: skip
        """Look up the angles of the rows; the rest is taken as it is."""
        angles = ropes.angles(rows.position)
        empty = page_table.new_empty(len(page_table), 0)
        return cls(
            ids, rows, page_table, empty, ropes, angles, is_prefill, rows.slot < 0, page_tokens,
            dtype,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids)
