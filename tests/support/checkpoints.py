"""Sound checkpoints of every kind, and bit equality of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4.core.config import ModelConfig
from dsv4.core.formats import BlockScaledTensor
from dsv4.testing.tiny import random_weights, tiny_config

Weight = Tensor | BlockScaledTensor

SHARD_BYTES = 700_000  # gives the tiny model six shards or more

CONFIGS = {
    "official": {},
    "base": {"expert_format": "fp8"},
    "base_f32": {"expert_format": "fp8"},
    "nvfp4": {"expert_format": "nvfp4"},
    "plain": {"expert_format": "bfloat16", "linear_format": "bfloat16"},
    "plain_f32": {"expert_format": "float32", "linear_format": "float32"},
    "no_mtp": {"num_nextn_predict_layers": 0},
}


def config_of(kind: str) -> ModelConfig:
    """The config of one of the sound checkpoints."""
    return tiny_config(**CONFIGS[kind])


def weights_of(kind: str) -> dict[str, Weight]:
    """The weights of one of the sound checkpoints."""
    scale_dtype = "F32" if kind == "base_f32" else "F8_E8M0"
    return random_weights(config_of(kind), seed=7, fp8_scale_dtype=scale_dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(*flat)


def same_weight(a: Weight, b: Weight) -> bool:
    """Same kind, format and bytes of every part."""
    if isinstance(a, BlockScaledTensor) and isinstance(b, BlockScaledTensor):
        parts = [
            (getattr(a, part), getattr(b, part))
            for part in ("data", "scale", "global_scale", "input_scale")
        ]
        return a.format is b.format and all(
            x is y if x is None or y is None else same_bits(x, y) for x, y in parts
        )
    return isinstance(a, Tensor) and isinstance(b, Tensor) and same_bits(a, b)


def assert_same_weights(got: Mapping[str, Weight], want: Mapping[str, Weight]) -> None:
    """Same names in the same order, same bits."""
    assert list(got) == list(want)
    assert [name for name in want if not same_weight(got[name], want[name])] == []
