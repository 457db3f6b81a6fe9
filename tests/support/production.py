"""Production models of random weights, and the reference beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.core.config import ModelConfig
from dsv4.core.formats import BlockScaledTensor
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.layers.indexer import IndexerForm
from dsv4.loader.writer import stored_parts
from dsv4.reference.model import ReferenceModel
from dsv4.reference.simulation import QuantSimulation
from dsv4.testing.tiny import random_weights, tiny_config

Weights = dict[str, Tensor | BlockScaledTensor]


def served_config(**overrides: Any) -> ModelConfig:
    """The tiny model with a window as wide as the kernels know, without an MTP block."""
    fields = {"sliding_window": 128, "num_nextn_predict_layers": 0}
    return tiny_config(**fields | overrides)


def production(
    config: ModelConfig, weights: Weights, dtype: torch.dtype = torch.float32,
    limits: EngineLimits | None = None, form: IndexerForm | None = None, device: str = "cpu",
    **rest: Any,
) -> ProductionModel:  # fmt: skip
    """A production model; activations have the dtype of its embedding table."""
    table = weights["embed.weight"]
    assert isinstance(table, Tensor)
    weights = weights | {"embed.weight": table.to(dtype)}
    stored = ((n, x) for name, w in weights.items() for n, x in stored_parts(name, w).items())
    limits = limits or EngineLimits(max_context=1024, max_rows=512)
    return ProductionModel(config, stored, device, limits, form, **rest)


def reference(
    config: ModelConfig, weights: Weights, dtype: torch.dtype = torch.float32,
    form: IndexerForm | None = None,
) -> ReferenceModel:  # fmt: skip
    """The reference with the roundings of the production cache."""
    form = form or IndexerForm()
    simulate = QuantSimulation("fp8_record", indexer=form.keys, hadamard=form.is_rotated)
    return ReferenceModel(config, weights, dtype, simulate)


def random_ids(config: ModelConfig, count: int, seed: int = 0) -> Tensor:
    """[count] ids."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (count,), generator=g)


__all__ = ["production", "random_ids", "random_weights", "reference", "served_config"]
