"""A tiny DeepSeek-V4 with every mechanism, and random weights for any config, to test with."""

from __future__ import annotations

from math import log2, prod, sqrt
from typing import Any

import torch
from torch import Generator, Tensor

from dsv4.core.config import ModelConfig
from dsv4.core.formats import (
    DTYPES,
    FORMATS,
    FP8_BLOCK128,
    NVFP4,
    BlockScaledFormat,
    BlockScaledTensor,
)
from dsv4.core.inventory import tensor_specs

# Root mean square of payloads drawn by `_payload`: e2m1 codes uniform over all 16, and FP8.
_FP4_RMS, _FP8_RMS = sqrt((0.25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8), 32.0


def tiny_config(**overrides: Any) -> ModelConfig:
    """Four layers (SWA, CSA, HCA, CSA; two of them hash-routed), one MTP block, 3.8 MB in FP4+FP8.

    Widths are multiples of 128, so that every group of the activation quantisers is whole. Sixteen
    indexer heads make ties of index scores rare. `overrides` replace fields of ModelConfig.
    """
    fields: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "head_dim": 128, "qk_rope_head_dim": 64, "q_lora_rank": 128, "o_groups": 2,
        "o_lora_rank": 64, "moe_intermediate_size": 128, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "num_hash_layers": 2, "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0, "index_n_heads": 16, "index_head_dim": 128, "index_topk": 16,
        "compress_ratios": (0, 4, 128, 4), "sliding_window": 16,
    }  # fmt: skip
    return ModelConfig(**fields | overrides)


def random_weights(
    config: ModelConfig, seed: int = 0, fp8_scale_dtype: str = "F8_E8M0"
) -> dict[str, Tensor | BlockScaledTensor]:
    """Weights of `config` under official parameter names, in the official dtypes.

    Matrices have standard deviation 1 / sqrt(fan_in), so that a forward pass stays near unit
    scale. Quantised ones are drawn as payload and power-of-two scales: no quantiser is needed,
    and their values are exact in BF16. `fp8_scale_dtype` "F32" is the variant of some -Base files.
    """
    rng = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor | BlockScaledTensor] = {}
    for name, spec in tensor_specs(config).items():
        if name != spec.parameter:
            continue
        if spec.format is not None:
            shape = (spec.shape[0], spec.shape[1] * spec.format.per_byte)
            weights[name] = random_block_scaled(spec.format, shape, rng, fp8_scale_dtype)
        elif name.endswith(".tid2eid"):
            scores = torch.rand(config.vocab_size, config.n_routed_experts, generator=rng)
            weights[name] = scores.argsort(dim=1)[:, : spec.shape[1]].contiguous()
        else:
            weights[name] = _plain(name, spec.shape, rng).to(DTYPES[spec.dtype])
    return weights


def random_block_scaled(
    fmt: BlockScaledFormat, shape: tuple[int, int], rng: Generator, fp8_scale_dtype: str = "F8_E8M0"
) -> BlockScaledTensor:
    """A random quantised matrix [out, in] of standard deviation 1 / sqrt(in) and spread scales."""
    fmt = FORMATS[fmt.name]
    rms = _FP8_RMS if fmt is FP8_BLOCK128 else _FP4_RMS
    exponent = round(log2(1 / (rms * sqrt(shape[1]))))
    jitter = torch.randint(-1, 2, fmt.scale_shape(shape), generator=rng)
    data = _payload(fmt, shape, rng)
    if fmt is NVFP4:
        scalar = torch.tensor(2.0**exponent)
        scale = torch.exp2(jitter.float()).to(torch.float8_e4m3fn)
        return BlockScaledTensor(fmt, data, scale, scalar, torch.tensor(1.0 / 64))
    scale = torch.exp2(jitter.float() + exponent)
    is_f32 = fmt is FP8_BLOCK128 and fp8_scale_dtype == "F32"
    scale = scale if is_f32 else (jitter + exponent + 127).to(torch.uint8).view(DTYPES["F8_E8M0"])
    return BlockScaledTensor(fmt, data, scale)


def _payload(fmt: BlockScaledFormat, shape: tuple[int, int], rng: Generator) -> Tensor:
    if fmt is FP8_BLOCK128:
        values = _FP8_RMS * torch.randn(shape, generator=rng)
        return values.clamp(-fmt.max_value, fmt.max_value).to(torch.float8_e4m3fn)
    codes = torch.randint(0, 256, fmt.payload_shape(shape), generator=rng)
    return codes.to(torch.uint8).view(DTYPES[fmt.value_dtype])


def _plain(name: str, shape: tuple[int, ...], rng: Generator) -> Tensor:
    """Norms near 1, mHC gains near 1/2, biases and sinks small, matrices 1 / sqrt(fan_in)."""
    noise = torch.randn(prod(shape), generator=rng).view(shape)
    parts = name.split(".")
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if name.endswith("_scale"):
        return 0.5 + 0.05 * noise
    if name.endswith(("_base", ".bias", ".ape")):
        return 0.1 * noise
    if parts[-1] == "attn_sink" or parts[0] == "embed":
        return noise
    return noise / sqrt(shape[-1])
