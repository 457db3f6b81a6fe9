"""Inputs of the embedding kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator


def embedding_case(
    T: int, V: int, D: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Arguments of embed_streams; every third id, from the second on, is outside [0, V)."""
    g = Generator().manual_seed(seed)
    ids = torch.randint(0, V, (T,), generator=g)
    outside = torch.tensor([-1, V, -(2**40), 2**40])
    ids[1::3] = outside[torch.arange(len(ids[1::3])) % 4]
    table = torch.randn(V, D, generator=g).to(dtype)
    return {"ids": ids.to(device), "table": table.to(device), "num_streams": 4}


def aot_calls() -> dict[str, dict[str, Any]]:
    """Calls at the widths of V4-Flash and V4-Pro; the rows of the table do not matter."""
    return {
        "embed_streams/flash": embedding_case(8, 64, 4096),
        "embed_streams/pro": embedding_case(8, 64, 7168),
    }
