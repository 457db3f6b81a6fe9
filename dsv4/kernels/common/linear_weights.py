"""Weights that share an input, joined when they are loaded so that one launch reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsv4.core.formats import FP8_BLOCK128, BlockScaledTensor


def join_rows(parts: Sequence[BlockScaledTensor]) -> BlockScaledTensor:
    """One FP8 weight with the rows of `parts` below each other: wq_a and wkv, w1 and w3.

    Every part but the last needs whole blocks of 128 rows, so that no block has two scales.
    Inverse: `split_rows`.
    """
    rows = FP8_BLOCK128.block[0]
    for i, part in enumerate(parts):
        if part.format is not FP8_BLOCK128:
            raise ValueError(f"parts[{i}]: expected {FP8_BLOCK128.name}, got {part.format.name}")
        if part.shape[1] != parts[0].shape[1] or part.scale.dtype != parts[0].scale.dtype:
            raise ValueError(f"parts[{i}]: expected the columns and scale dtype of parts[0]")
        if part.shape[0] % rows and i + 1 < len(parts):
            raise ValueError(f"parts[{i}]: expected a multiple of {rows} rows, got {part.shape[0]}")
    kind = parts[0].scale.dtype
    raw = torch.uint8 if kind == torch.float8_e8m0fnu else kind
    data = torch.cat([p.data.view(torch.uint8) for p in parts]).view(parts[0].data.dtype)
    scale = torch.cat([p.scale.view(raw) for p in parts]).view(kind)
    return BlockScaledTensor(FP8_BLOCK128, data, scale)


def split_rows(joined: BlockScaledTensor, rows: Sequence[int]) -> list[BlockScaledTensor]:
    """The parts that `join_rows` put together, as views; `rows` of each in order."""
    if sum(rows) != joined.shape[0]:
        raise ValueError(f"rows: expected a sum of {joined.shape[0]}, got {list(rows)}")
    data = joined.data.split(list(rows))
    scale = joined.scale.split([-(-r // FP8_BLOCK128.block[0]) for r in rows])
    return [BlockScaledTensor(FP8_BLOCK128, d, s) for d, s in zip(data, scale, strict=True)]
