"""Random full-width models, and the bytes that their steps must read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4.core.config import ModelConfig
from dsv4.core.errors import RequestError
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.engine.roofline import step_bytes
from dsv4.engine.single import SingleSequence
from dsv4.engine.synthetic import sliced_config, synthetic_tensors
from support.oracle_ops import use_oracles

FLASH = sliced_config(ModelConfig.flash(), None, 160)


@pytest.mark.parametrize("expert_format", ["mxfp4", "nvfp4"])
def test_activations_stay_near_unit_scale(
    expert_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_oracles(monkeypatch)
    config = sliced_config(replace(ModelConfig.nano(), expert_format=expert_format), 5, 8)
    assert (config.num_hidden_layers, config.n_routed_experts) == (5, 8)
    stored = synthetic_tensors(config, "cpu")
    one = SingleSequence(ProductionModel(config, stored, "cpu", EngineLimits(max_context=256)))
    logits = one.forward(torch.arange(20), one.new_cache())
    assert 0.5 < float(logits.std()) < 2
    other = dict(synthetic_tensors(config, "cpu", seed=1))
    for name, x in synthetic_tensors(config, "cpu"):
        is_scale = name.endswith((".scale", ".weight_scale", "scale_2", "input_scale"))
        assert torch.equal(x.float(), other[name].float()) == is_scale, name


def test_what_a_step_of_flash_must_read() -> None:
    one = step_bytes(FLASH, 1, 1024)
    assert one.total == pytest.approx(11.2e9, rel=0.01)  # 160 experts a layer fit one H200
    expert = 3 * 4096 * 2048 * (1 / 2 + 1 / 32)
    assert one.experts == pytest.approx(43 * 6 * expert)
    many = step_bytes(FLASH, 64, 1024)
    assert many.linears == one.linears
    assert many.cache == 64 * one.cache
    assert many.experts == pytest.approx(43 * 160 * expert * (1 - (1 - 6 / 160) ** 64))
    long = step_bytes(FLASH, 1, 131072).cache
    csa = 128 * 584 + 512 * 584 + 32768 * 132
    hca = 128 * 584 + 1024 * 584
    assert long == 2 * 128 * 584 + 21 * csa + 20 * hca


@pytest.mark.parametrize(("layers", "experts"), [(0, 8), (44, 8), (3, 5), (3, 257)])
def test_slices_that_there_are_not(layers: int, experts: int) -> None:
    with pytest.raises(RequestError):
        sliced_config(ModelConfig.flash(), layers or -1, experts)
