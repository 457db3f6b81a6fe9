"""Inputs of the sampler: rows of logits and the parameters of their requests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

VOCAB = 129280


def logit_rows(
    B: int, V: int, kind: str = "peaked", seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits [B, V].

    kind  "flat" normal numbers, "peaked" with the tail of a language model, "ties" from few values,
          "equal" all the same, "masked" all but some -inf or -1e9
    """
    g = Generator().manual_seed(seed)
    normal = torch.randn(B, V, generator=g)
    if kind == "peaked":
        # Exponential tails: each nat further down holds a constant factor more tokens.
        x = 2 * torch.rand(B, V, generator=g).clamp(min=1e-9).log().neg() + 0.3 * normal
    elif kind == "ties":
        x = (normal * 2).round()
    elif kind == "equal":
        x = torch.full((B, V), 1.25)
    elif kind == "masked":
        far = torch.where(normal > 0.5, -1e9, -torch.inf)
        x = torch.where(torch.rand(B, V, generator=g) < 20 / V, normal, far)
        x[:, V // 2] = 0.0
    else:
        x = normal
    return x.to(dtype)


def request_rows(B: int, seed: int = 0, **given: float) -> dict[str, Tensor]:
    """Parameters of B requests: temperature 1 and random seeds and positions, and what is given."""
    g = Generator().manual_seed(seed)
    rows = {
        "temperature": torch.full((B,), float(given.get("temperature", 1.0))),
        "seed": torch.randint(-(2**63), 2**63 - 1, (B,), generator=g),
        "position": torch.randint(0, 1 << 20, (B,), generator=g),
    }
    for name in ("top_k", "top_p", "min_p"):
        if name in given:
            dtype = torch.int32 if name == "top_k" else torch.float32
            rows[name] = torch.full((B,), given[name], dtype=dtype)
    return rows


def mixed_rows(B: int, seed: int = 0) -> dict[str, Tensor]:
    """Every third request greedy, the others with all kinds of filters."""
    rows = request_rows(B, seed)
    b = torch.arange(B)
    choose = {
        "temperature": torch.tensor([0.0, 1.0, 0.6])[b % 3],
        "top_k": torch.tensor([0, 50, 1, 7, 0, 100000], dtype=torch.int32)[b % 6],
        "top_p": torch.tensor([1.0, 0.9, 0.3, 1.0, 0.999])[b % 5],
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.01])[b % 4],
    }
    return rows | choose


def aot_calls() -> dict[str, dict[str, Any]]:
    """Calls of the sampler at the vocabulary of the model: with and without filters."""
    calls: dict[str, dict[str, Any]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        logits = torch.zeros(8, VOCAB, dtype=dtype)
        none = {"top_k": None, "top_p": None, "min_p": None}
        calls[f"sample/{name}/plain"] = {"logits": logits, **none, **request_rows(8)}
        calls[f"sample/{name}/filters"] = {"logits": logits, **mixed_rows(8)}
        top_p = none | request_rows(8, top_p=0.95)
        calls[f"sample/{name}/top_p"] = {"logits": logits, **top_p}
    return calls
