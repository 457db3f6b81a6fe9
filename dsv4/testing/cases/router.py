"""Inputs of the router kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

FLASH, PRO, NANO = (256, 6), (384, 6), (16, 6)  # experts, chosen a token
SCALING = 1.5
VOCAB = 129280


def router_logits(T: int, E: int, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits [T, E] of a spread that uses both ends of softplus, and a bias [E]."""
    g = Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=g) * 4
    return logits.to(device), (torch.randn(E, generator=g) * 0.1).to(device)


def hash_table(V: int, E: int, K: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """K different experts for every token of a vocabulary, [V, K] int32."""
    return distinct_experts(V, E, K, seed, device)


def distinct_experts(T: int, E: int, K: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """K different random experts a token, [T, K] int32."""
    g = Generator().manual_seed(seed)
    first = torch.randint(0, E, (T, 1), generator=g)
    # Multiples of an odd step modulo E, E / gcd(step, E) of them different.
    step = 1 + 2 * torch.randint(0, max(1, E // (2 * K)), (T, 1), generator=g)
    ids = (first + step * torch.arange(K)) % E
    return ids.to(torch.int32).to(device)


def aot_calls() -> dict[str, dict[str, Any]]:
    """Calls of every router kernel: decode and prefill at the sizes of V4-Flash and V4-Pro."""
    calls: dict[str, dict[str, Any]] = {}
    for name, (E, K) in (("flash", FLASH), ("pro", PRO)):
        for T in (8, 8192):
            logits, bias = torch.zeros(T, E), torch.zeros(E)
            shape = f"{name}/{T}"
            calls[f"router_topk/{shape}"] = {
                "logits": logits, "bias": bias, "k": K, "scaling": SCALING, "is_padding": None,
            }  # fmt: skip
            calls[f"router_topk/{shape}/padded"] = calls[f"router_topk/{shape}"] | {
                "is_padding": torch.zeros(T, dtype=torch.bool)
            }
            calls[f"moe_align/{shape}"] = {
                "experts": torch.zeros(T, K, dtype=torch.int32), "first_expert": 0,
                "num_experts": E, "block_size": 16 if T == 8 else 64,
            }  # fmt: skip
        for dtype in (torch.int32, torch.int64):
            calls[f"router_hash/{name}/{dtype}".replace("torch.", "")] = {
                "logits": torch.zeros(8, E), "tid2eid": torch.zeros(16, K, dtype=dtype),
                "token_ids": torch.zeros(8, dtype=torch.int64), "scaling": SCALING,
            }  # fmt: skip
    return calls
