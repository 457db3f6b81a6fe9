"""Kernels at the sizes of the real models, on a GPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.testing.cases.linear import FLASH, PRO

# Kinds of attention, as AttentionCase takes them.
ATTENTION_KINDS: dict[str, dict[str, Any]] = {
    "csa": {"topk": 512, "ratio": 4, "per_page": 64},
    "hca": {"ratio": 128, "per_page": 2},
    "swa": {"ratio": 1 << 20, "per_page": 1},
}

# FP8 linears of both models: rows, columns, groups.
LINEAR_SHAPES = {f"flash-{k}": v for k, v in FLASH.items()} | {
    f"pro-{k}": v for k, v in PRO.items()
}


def needs_hopper() -> None:
    """Skip what only a kernel for SM 9x does."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs SM 9x")


def fp8_weight_on_gpu(N: int, K: int) -> tuple[Tensor, Tensor]:
    """On the device from the start: the large ones are 100 MB."""
    g = torch.Generator("cuda").manual_seed(0)
    weight = 32 * torch.randn(N, K, device="cuda", generator=g)
    scale = torch.randint(114, 118, (-(-N // 128), K // 128), device="cuda", generator=g)
    scale = scale.to(torch.uint8).view(torch.float8_e8m0fnu)
    return weight.clamp(-448, 448).to(torch.float8_e4m3fn), scale


def launched(kernel: ModuleType, *args: Any) -> Tensor:
    """The result of one kernel, whatever `select` would take; NaN where it writes nothing."""
    out = kernel.outputs(*args)
    for t in out[:2]:
        t.fill_(float("nan"))
    kernel.launch(*args, out)
    return out[0]
