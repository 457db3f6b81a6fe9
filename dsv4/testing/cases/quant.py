"""Inputs of the quantising kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from dsv4.testing.cases.norm import vectors

BF16 = torch.bfloat16


def any_number(count: int, dtype: torch.dtype = BF16, group: int = 16, seed: int = 0) -> Tensor:
    """[n, group] of every BF16 number, or of as many random FP32 bits, no group wild all through.

    Every other group holds numbers of one magnitude, so that codes of all sizes occur. No NaN and
    no infinity.
    """
    g = Generator().manual_seed(seed)
    if dtype is BF16:
        bits = torch.arange(count).to(torch.int16)[torch.randperm(count, generator=g)]
        x = bits.view(BF16)
    else:
        bits = torch.randint(-(2**31), 2**31, (count,), generator=g).to(torch.int32)
        x = bits.view(torch.float32)
    x = torch.where(x.isfinite(), x, 1.0)[: count // group * group].view(-1, group)
    spread = 2.0 ** torch.randint(-130, 120, (len(x), 1), generator=g)
    level = (torch.rand(x.shape, generator=g) - 0.5) * spread.float()
    return torch.where(torch.arange(len(x))[:, None] % 2 == 0, x, level.to(dtype))


def quant_calls(num_rows: int, dims: int = 256, device: str = "cpu") -> dict[str, dict[str, Any]]:
    """Arguments of every op, "op" or "op/variant"."""
    x = vectors(num_rows, dims, device=device)
    share = torch.tensor(0.01, device=device)

    def codes(columns: int, count: int, low: int, high: int) -> Tensor:
        g = Generator().manual_seed(columns)
        return torch.randint(low, high, (count, columns), generator=g, dtype=torch.uint8).to(device)

    def blocks(n: int) -> int:
        return -(-n // 128)

    e8m0, e4m3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
    data = codes(dims, num_rows, 0, 127).view(e4m3)
    packed = codes(dims // 2, num_rows, 0, 256)
    fp8 = {"data": data, "scale": codes(dims // 128, num_rows, 110, 130).view(e8m0)}
    weights = codes(blocks(dims), blocks(num_rows), 110, 130).view(e8m0)
    mxfp4 = {"packed": packed, "scale": codes(dims // 32, num_rows, 110, 130).view(e8m0)}
    nvfp4 = {"packed": packed, "scale": codes(dims // 16, num_rows, 1, 127).view(e4m3)}
    return {
        "fp8_act_quantize": {"x": x, "group": 128},
        "fp8_act_dequantize": {**fp8, "dtype": BF16},
        "fp8_block_quantize": {"w": x},
        "fp8_block_dequantize": {"data": data, "scale": weights, "dtype": BF16},
        "mxfp4_act_quantize": {"x": x, "group": 32},
        "mxfp4_act_dequantize": {**mxfp4, "dtype": BF16},
        "nvfp4_act_quantize": {"x": x, "global_scale": None},
        "nvfp4_act_quantize/given": {"x": x, "global_scale": share},
        "nvfp4_act_dequantize": {**nvfp4, "global_scale": share, "dtype": BF16},
    }


def aot_calls() -> dict[str, dict[str, Any]]:
    """A call of every kernel at the size of V4-Flash; rows count only at run time."""
    return quant_calls(8, 4096)
