"""transformers models as weights of the reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from dsv4.core.config_dialects import parse_config
from dsv4.loader.names import stacked_experts, to_official
from dsv4.reference.model import ReferenceModel


def official_weights(model: DeepseekV4ForCausalLM) -> dict[str, Tensor]:
    """The parameters and buffers of `model` under their official names, experts taken apart."""
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        parts = stacked_experts(name, model.config.n_routed_experts)
        if parts:
            rows = tensor.flatten(0, 1).chunk(len(parts))
            out |= dict(zip(parts, rows, strict=True))
            continue
        official = to_official(name)
        assert official is not None, name
        out[official] = tensor
    return out


def tier1_of(model: DeepseekV4ForCausalLM) -> ReferenceModel:
    """The reference with the very weights of `model`, in FP32."""
    raw: dict[str, Any] = model.config.to_dict() | {"torch_dtype": "float32"}
    raw.pop("quantization_config", None)
    return ReferenceModel(parse_config(raw).config, official_weights(model))
