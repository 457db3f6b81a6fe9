"""Which checkpoints have kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dsv4.core.config import ModelConfig
from dsv4.core.errors import ConfigError
from dsv4.layers.weights import DeviceWeights


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", 4032), ("moe_intermediate_size", 2080), ("q_lora_rank", 1000),
     ("linear_format", "bfloat16"), ("expert_format", "fp8")],
)  # fmt: skip
def test_a_checkpoint_without_kernels_is_refused_before_it_is_read(name: str, value: Any) -> None:
    config = replace(ModelConfig.flash(), **{name: value})
    with pytest.raises(ConfigError, match=name):
        DeviceWeights.load(config, iter(()), "cpu")
