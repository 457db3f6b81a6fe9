"""Inputs of the linear kernels: weights as the checkpoints store them, tokens of many sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from dsv4.core.formats import FP8_BLOCK128
from dsv4.testing.tiny import random_block_scaled

# name -> rows, columns of a group, groups. Where several parameters share an input, their rows
# follow each other: the shared expert's gate and up, the two projections of the hidden state.
FLASH = {
    "wq_a": (1024, 4096, 1), "wkv": (512, 4096, 1), "wq_a_wkv": (1536, 4096, 1),
    "wq_b": (32768, 1024, 1), "indexer_wq_b": (8192, 1024, 1), "wo_a": (8192, 4096, 8),
    "wo_b": (4096, 8192, 1), "shared_w13": (4096, 4096, 1), "shared_w2": (4096, 2048, 1),
    "e_proj": (4096, 4096, 1),
}  # fmt: skip
PRO = {
    "wq_a": (1536, 7168, 1), "wkv": (512, 7168, 1), "wq_a_wkv": (2048, 7168, 1),
    "wq_b": (65536, 1536, 1), "indexer_wq_b": (8192, 1536, 1), "wo_a": (16384, 4096, 16),
    "wo_b": (7168, 16384, 1), "shared_w13": (6144, 7168, 1), "shared_w2": (7168, 3072, 1),
    "e_proj": (7168, 7168, 1),
}  # fmt: skip

# Rows and columns of BF16 weights with FP32 results; value and gate rows of a compressor joined.
WIDE_FLASH = {
    "gate": (256, 4096), "compressor_csa": (2048, 4096), "compressor_hca": (1024, 4096),
    "compressor_indexer": (512, 4096), "weights_proj": (64, 4096),
}  # fmt: skip
# value and gate rows of the compressor, those of the indexer's, and its head weights
JOINED_FLASH = {"csa": [1024, 1024, 256, 256, 64], "hca": [512, 512]}
HEAD_FLASH = (129280, 4096)


def fp8_weight(
    N: int, K: int, scale_dtype: str = "F8_E8M0", seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """A weight [N, K] of standard deviation 1 / sqrt(K), every code of E4M3 in it, and scales."""
    made = random_block_scaled(FP8_BLOCK128, (N, K), Generator().manual_seed(seed), scale_dtype)
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # without the NaNs
    flat = made.data.view(torch.uint8).flatten()
    count = min(len(codes), flat.numel())
    flat[:count] = codes[:count]
    return made.data.to(device), made.scale.to(device)


def tokens(T: int, width: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """BF16 [T, width]: normal numbers, every row of another magnitude."""
    g = Generator().manual_seed(seed)
    x = torch.randn(T, width, generator=g) * torch.exp2(torch.arange(T) % 7 - 3.0)[:, None]
    return x.to(torch.bfloat16).to(device)


def fp8_tokens(T: int, width: int, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """E4M3 [T, width] of any code but NaN, and UE8M0 scales of 128 columns."""
    g = Generator().manual_seed(seed)
    code = torch.randint(0, 127, (T, width), generator=g)
    code += 128 * torch.randint(0, 2, code.shape, generator=g)
    byte = torch.randint(115, 122, (T, width // 128), generator=g)
    code, byte = code.to(torch.uint8), byte.to(torch.uint8)
    return code.view(torch.float8_e4m3fn).to(device), byte.view(torch.float8_e8m0fnu).to(device)


def joined_args(
    T: int, K: int, parts: list[int], ratio: int = 4, seed: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """Arguments of joined_wide_linear."""
    g = Generator().manual_seed(seed)
    N = sum(parts)
    weight = (torch.randn(N, K, generator=g) / K**0.5).to(torch.bfloat16)
    return {
        "x": tokens(T, K, seed, device), "weight": weight.to(device),
        "bias": torch.randn(ratio, N, generator=g).to(device),
        "position": torch.randint(0, 1 << 20, (T,), generator=g).to(device), "parts": parts,
    }  # fmt: skip


def aot_calls() -> dict[str, dict[str, Any]]:
    """A call of every linear kernel in each of its forms; ahead of time only shapes matter."""
    calls = {f"linear_fp8/{T}": _empty_fp8(T, FLASH["wo_a"]) for T in (1, 24, 64, 8192)}
    calls |= {
        f"linear_fp8/{T}_w8a8": _empty_fp8(T, FLASH["wo_b"], quantize_input=True)
        for T in (1, 64, 8192)
    }
    for T in (1, 64, 8192):
        empty = _empty_fp8(T, FLASH["wo_a"])
        del empty["quantize_input"]
        code = torch.empty(empty["x"].shape, dtype=torch.float8_e4m3fn)
        byte = torch.empty(T, code.shape[1] // 128, dtype=torch.uint8)
        empty |= {"x": code, "x_scale": byte.view(torch.float8_e8m0fnu)}
        calls[f"linear_fp8_w8a8/{T}"] = empty
    calls["linear_fp8/wq_b"] = _empty_fp8(1, FLASH["wq_b"])
    calls["linear_fp8/pro"] = _empty_fp8(1, PRO["wo_b"])
    for T in (1, 24, 64, 8192):
        x, weight = (torch.empty(n, 4096, dtype=torch.bfloat16) for n in (T, 256))
        calls[f"wide_linear/{T}"] = {"x": x, "weight": weight}
        calls[f"joined_wide_linear/{T}"] = joined_args(T, 4096, JOINED_FLASH["csa"])
    return calls


def _empty_fp8(T: int, shape: tuple[int, int, int], quantize_input: bool = False) -> dict[str, Any]:
    N, K, groups = shape
    scale = torch.empty(-(-N // 128), -(-K // 128), dtype=torch.uint8)
    return {
        "x": torch.empty(T, groups * K, dtype=torch.bfloat16),
        "weight": torch.empty(N, K, dtype=torch.float8_e4m3fn),
        "scale": scale.view(torch.float8_e8m0fnu),
        "groups": groups,
        "quantize_input": quantize_input,
    }
