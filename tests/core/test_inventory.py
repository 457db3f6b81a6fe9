"""The tensor list against the published indexes and the published sizes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.formats import FP8_BLOCK128, MXFP4, NVFP4
from dsv4.core.inventory import TensorSpec, tensor_specs
from dsv4.testing.tiny import tiny_config

FLASH, PRO = ModelConfig.flash(), ModelConfig.pro()


@cache
def specs_of(config: ModelConfig) -> dict[str, TensorSpec]:
    """The inventory, computed once: Pro has 145,116 tensors."""
    return tensor_specs(config)


def total(specs: dict[str, TensorSpec], *prefixes: str, inside: str = "") -> int:
    """Bytes of the tensors under any of the prefixes whose name holds `inside`."""
    return sum(s.nbytes for n, s in specs.items() if n.startswith(prefixes or "") and inside in n)


@pytest.mark.parametrize(
    ("config", "num_tensors", "num_bytes", "mtp_tensors", "mtp_bytes"),
    [
        (FLASH, 69_187, 159_609_485_896, 1_575, 3_593_787_756),
        (PRO, 145_116, 864_704_792_696, 2_343, 13_956_587_692),
    ],
)
def test_totals_are_those_of_the_published_indexes(
    config: ModelConfig, num_tensors: int, num_bytes: int, mtp_tensors: int, mtp_bytes: int
) -> None:
    specs = specs_of(config)
    assert (len(specs), total(specs)) == (num_tensors, num_bytes)
    assert sum(n.startswith("mtp.") for n in specs) == mtp_tensors
    assert total(specs, "mtp.") == mtp_bytes


@pytest.mark.parametrize(
    ("config", "counts"),
    [(FLASH, (433, 417, 375, 34_167, 33_792, 3)), (PRO, (619, 590, 528, 71_952, 71_424, 3))],
)
def test_dtypes_are_those_of_the_published_indexes(config: ModelConfig, counts: tuple) -> None:
    found = Counter(s.dtype for s in specs_of(config).values())
    assert tuple(found[d] for d in ("BF16", "F32", "F8_E4M3", "F8_E8M0", "I8", "I64")) == counts
    assert sum(counts) == sum(found.values())


@pytest.mark.parametrize(
    ("config", "layers", "num_bytes"),
    [
        (FLASH, (0, 1), 3_566_148_952),  # SWA, hash
        (FLASH, (2,), 3_596_055_640),  # CSA, hash
        (FLASH, (4, 6, 42), 3_589_851_224),  # CSA, score
        (FLASH, (3, 5, 41), 3_568_596_312),  # HCA, score
        (PRO, (0, 1), 13_874_466_328),  # HCA, hash
        (PRO, (2,), 13_909_746_200),
        (PRO, (4, 60), 13_903_542_296),
        (PRO, (3, 59), 13_868_262_424),
    ],
)
def test_layer_totals(config: ModelConfig, layers: tuple[int, ...], num_bytes: int) -> None:
    specs = specs_of(config)
    for layer in layers:
        assert total(specs, f"layers.{layer}.") == num_bytes


@pytest.mark.parametrize(
    ("prefix", "flash", "pro"),
    [
        ("layers.4.hc_", 3_145_944, 5_505_240),
        ("layers.4.attn.compressor.", 16_794_624, 29_377_536),
        ("layers.3.attn.compressor.", 8_651_776, 14_943_232),
        ("layers.4.attn.indexer.", 13_112_064, 20_845_568),
        ("layers.4.ffn.gate.", 2_098_176, 5_506_560),
        ("layers.0.ffn.gate.", 2_097_152 + 6_205_440, 5_505_024 + 6_205_440),
        ("layers.4.ffn.shared_experts.", 25_167_360, 66_064_320),
        ("layers.4.ffn.experts.7.", 13_369_344, 35_094_528),
        ("layers.4.ffn.experts.", 3_422_552_064, 13_476_298_752),
        ("layers.4.attn.wq_b.", 33_556_480, 100_669_440),
        ("layers.4.attn.wo_b.", 33_556_480, 117_447_680),
        ("embed.", 1_059_061_760, 1_853_358_080),
    ],
)
def test_component_bytes(prefix: str, flash: int, pro: int) -> None:
    assert total(specs_of(FLASH), prefix) == flash
    assert total(specs_of(PRO), prefix) == pro


def test_nvfp4_totals() -> None:
    for config, num_bytes in ((FLASH, 168_266_793_544), (PRO, 913_061_485_688)):
        specs = specs_of(replace(config, expert_format="nvfp4"))
        assert total(specs) == num_bytes
        assert specs["mtp.0.ffn.experts.0.w1.weight"].format is MXFP4
    expert = "layers.9.ffn.experts.1.w1"
    assert specs[f"{expert}.weight"].format is NVFP4
    assert specs[f"{expert}.weight_scale_2"].shape == ()
    assert f"{expert}.scale" not in specs


def test_base_has_fp8_experts() -> None:
    specs = specs_of(replace(FLASH, expert_format="fp8"))
    assert len(specs) == 69_187
    expert = specs["layers.9.ffn.experts.1.w2.weight"]
    assert (expert.format, expert.shape, expert.dtype) == (FP8_BLOCK128, (4096, 2048), "F8_E4M3")
    assert specs["layers.9.ffn.experts.1.w2.scale"].shape == (32, 16)


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "BF16"), ("float32", "F32")])
def test_plain_files_have_no_scales(dtype: str, name: str) -> None:
    specs = specs_of(tiny_config(expert_format=dtype, linear_format=dtype))
    assert not any(n.endswith(".scale") for n in specs)
    assert all(s.format is None and s.parameter == n for n, s in specs.items())
    assert specs["layers.0.attn.wq_a.weight"].dtype == name
    assert specs["layers.0.ffn.experts.0.w1.weight"].dtype == name


def test_presence_rules() -> None:
    specs = specs_of(FLASH)
    for layer in range(FLASH.num_hidden_layers):
        kind, prefix = FLASH.layer_kind(layer), f"layers.{layer}."
        has_compressor = any(n.startswith(f"{prefix}attn.compressor.") for n in specs)
        has_indexer = any(n.startswith(f"{prefix}attn.indexer.") for n in specs)
        assert (has_compressor, has_indexer) == (kind is not LayerKind.SWA, kind is LayerKind.CSA)
        assert (f"{prefix}ffn.gate.tid2eid" in specs) == (layer < 3)
        assert (f"{prefix}ffn.gate.bias" in specs) == (layer >= 3)


def test_dspark_files_have_no_mtp_block() -> None:
    specs = specs_of(replace(FLASH, dspark_block_size=5))
    assert not any(n.startswith("mtp.") for n in specs)
    assert total(specs) == 156_015_698_140


def test_scale_tensors_point_to_their_parameter() -> None:
    specs = specs_of(tiny_config(expert_format="nvfp4"))
    for name, spec in specs.items():
        assert spec.parameter in specs
        assert (spec.name == spec.parameter) == name.endswith(
            ("weight", "ape", "sink", "bias", "base", "fn", "tid2eid", "_attn_scale", "_ffn_scale",
             "hc_head_scale")
        )  # fmt: skip
