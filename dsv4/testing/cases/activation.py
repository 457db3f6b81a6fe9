"""Inputs of the activation kernel."""

from __future__ import annotations

from typing import Any

import torch


def activation_case(
    T: int, F: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Gates and ups of T tokens, some of them far beyond the limit, some zero."""
    g = torch.Generator().manual_seed(seed)
    x = 6 * torch.randn(T, 2 * F, generator=g)
    x[:, ::13] *= 50
    x[:, 5::29] = 0.0
    x[:, 7::31] = -0.0
    return {"gate_up": x.to(dtype).to(device), "limit": 10.0}


def aot_calls() -> dict[str, dict[str, Any]]:
    """Flash and Pro."""
    return {f"gate_up_swiglu/{F}": activation_case(4, F) for F in (2048, 3072)}
