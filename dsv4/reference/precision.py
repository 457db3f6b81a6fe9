"""Which arithmetic a step runs in, so that one source serves FP64, FP32 and BF16."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in the precision of norms, softmax, mHC and scores: FP32, or FP64 if it is FP64."""
    return x if x.dtype == torch.float64 else x.float()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that `wide` gives for a tensor of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
