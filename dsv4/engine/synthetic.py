"""Random weights of any config, made on the device: full-width models without their files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import log2, prod, sqrt

import torch
from torch import Generator, Tensor

from dsv4.core.config import ModelConfig
from dsv4.core.errors import RequestError
from dsv4.core.formats import DTYPES, FP8_BLOCK128, BlockScaledFormat
from dsv4.core.inventory import TensorSpec, tensor_specs

# Root mean square of payloads as drawn here: e2m1 codes uniform over all 16, and FP8 normal.
FP4_RMS, FP8_RMS = sqrt((0.25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8), 32.0
E8M0_BIAS, FP8_MAX = 127, 448.0


def sliced_config(config: ModelConfig, layers: int | None, experts: int | None) -> ModelConfig:
    """The first `layers` layers of `config`, with `experts` experts; widths stay as they are."""
    L, E = layers or config.num_hidden_layers, experts or config.n_routed_experts
    if not 1 <= L <= config.num_hidden_layers:
        raise RequestError("--layers", f"1 to {config.num_hidden_layers}", layers)
    if not config.num_experts_per_tok <= E <= config.n_routed_experts:
        legal = f"{config.num_experts_per_tok} to {config.n_routed_experts}"
        raise RequestError("--experts", legal, experts)
    return replace(
        config, num_hidden_layers=L, n_routed_experts=E, num_nextn_predict_layers=0,
        compress_ratios=config.compress_ratios[:L], num_hash_layers=min(config.num_hash_layers, L),
    )  # fmt: skip


def synthetic_tensors(
    config: ModelConfig, device: torch.device | str, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor of `config`, official names, in the official formats.

    Matrices have standard deviation 1 / sqrt(fan_in), so that activations stay near unit scale;
    all scales of one matrix are equal. Nothing passes through host memory.
    """
    g = Generator(device).manual_seed(seed)
    for name, spec in tensor_specs(config).items():
        yield name, _draw(name, spec, config, g)


def _draw(name: str, spec: TensorSpec, config: ModelConfig, g: Generator) -> Tensor:
    fmt = spec.format
    if name.endswith(".tid2eid"):
        scores = torch.rand(spec.shape[0], config.n_routed_experts, generator=g, device=g.device)
        return scores.argsort(dim=1)[:, : spec.shape[1]].contiguous()
    if fmt is None:
        return _plain(name, spec.shape, g).to(DTYPES[spec.dtype])
    if name == spec.parameter:
        return _payload(fmt, spec, g)
    return _scale(spec, fmt, config, g.device)


def _payload(fmt: BlockScaledFormat, spec: TensorSpec, g: Generator) -> Tensor:
    if fmt.name == FP8_BLOCK128.name:
        values = FP8_RMS * torch.randn(spec.shape, generator=g, device=g.device)
        return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    codes = torch.randint(0, 256, spec.shape, generator=g, device=g.device, dtype=torch.uint8)
    return codes.view(DTYPES[spec.dtype])


def _scale(
    spec: TensorSpec, fmt: BlockScaledFormat, config: ModelConfig, device: torch.device
) -> Tensor:
    """Scales that give a matrix of `spec.parameter` the right spread; scalars of NVFP4 too."""
    if spec.name.endswith("input_scale"):
        return torch.ones(spec.shape, device=device)
    fan_in = spec.shape[1] * fmt.block[1] if len(spec.shape) == 2 else _fan_in(spec, config)
    rms = FP8_RMS if fmt.name == FP8_BLOCK128.name else FP4_RMS
    exponent = round(log2(1 / (rms * sqrt(fan_in))))
    if spec.name.endswith("weight_scale_2"):
        return torch.full(spec.shape, 2.0**exponent, device=device)
    if fmt.has_global:
        return torch.ones(spec.shape, device=device).to(torch.float8_e4m3fn)
    byte = torch.full(spec.shape, exponent + E8M0_BIAS, dtype=torch.uint8, device=device)
    return byte.view(torch.float8_e8m0fnu)


def _fan_in(spec: TensorSpec, config: ModelConfig) -> int:
    is_down = ".w2." in spec.name
    return config.moe_intermediate_size if is_down else config.hidden_size


def _plain(name: str, shape: tuple[int, ...], g: Generator) -> Tensor:
    """Norms near 1, mHC gains near 1/2, biases and sinks small, matrices 1 / sqrt(fan_in)."""
    noise = torch.randn(prod(shape), generator=g, device=g.device).view(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if name.endswith("_scale"):
        return 0.5 + 0.05 * noise
    if name.endswith(("_base", ".bias", ".ape")):
        return 0.1 * noise
    if name.endswith(".attn_sink") or name.startswith("embed."):
        return noise
    return noise / sqrt(shape[-1])
