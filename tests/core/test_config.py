"""config.json in both dialects, and every refusal by the name of its field."""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV4Config

from dsv4.core.config import LayerKind, ModelConfig, YarnScaling
from dsv4.core.config_dialects import parse_config, to_official
from dsv4.core.errors import ConfigError, Dsv4Error, RequestError
from dsv4.core.sampling import SamplingParams
from dsv4.testing.tiny import tiny_config

FLASH, PRO = ModelConfig.flash(), ModelConfig.pro()
GOLDEN = json.loads(
    (Path(__file__).parents[1] / "data" / "golden_small" / "config.json").read_text()
)
QUANT = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip
# The published file of 2026-04-24, which has no expert_dtype.
FLASH_JSON = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 129280,
    "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64,
    "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1024,
    "o_groups": 8, "o_lora_rank": 1024, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 6, "num_hash_layers": 3,
    "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "hidden_act": "silu", "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "index_n_heads": 64,
    "index_head_dim": 128, "index_topk": 512, "sliding_window": 128,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0], "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536,
                     "beta_fast": 32, "beta_slow": 1},
    "max_position_embeddings": 1048576, "num_nextn_predict_layers": 1, "attention_bias": False,
    "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16", "use_cache": True,
    "transformers_version": "4.57.1", "quantization_config": QUANT,
}  # fmt: skip


def transformers_json(raw: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers writes it."""
    keep = {k: v for k, v in raw.items() if k != "architectures"}
    return DeepseekV4Config(**copy.deepcopy(keep)).to_dict()


def test_the_published_flash_file() -> None:
    parsed = parse_config(FLASH_JSON)
    assert parsed.config == FLASH
    assert (parsed.dialect, parsed.unknown_keys) == ("official", ())
    assert ModelConfig.from_hf(FLASH_JSON) == FLASH


def test_layer_schedules() -> None:
    flash = [FLASH.layer_kind(i) for i in range(43)]
    assert [flash.count(k) for k in (LayerKind.SWA, LayerKind.CSA, LayerKind.HCA)] == [2, 21, 20]
    assert flash[:4] == [LayerKind.SWA, LayerKind.SWA, LayerKind.CSA, LayerKind.HCA]
    assert (flash[42], FLASH.layer_kind(43)) == (LayerKind.CSA, LayerKind.SWA)
    pro = [PRO.layer_kind(i) for i in range(61)]
    assert [pro.count(k) for k in (LayerKind.SWA, LayerKind.CSA, LayerKind.HCA)] == [0, 30, 31]
    assert [FLASH.is_hash_layer(i) for i in range(5)] == [True] * 3 + [False] * 2
    assert (FLASH.nope_head_dim, LayerKind.HCA.ratio) == (448, 128)


@pytest.mark.parametrize(
    "config",
    [
        FLASH, PRO, ModelConfig.nano(), tiny_config(), replace(FLASH, expert_format="nvfp4"),
        replace(FLASH, expert_format="fp8"), replace(FLASH, dspark_block_size=5),
        tiny_config(expert_format="bfloat16", linear_format="bfloat16"),
        tiny_config(expert_format="float32", linear_format="float32"), tiny_config(yarn=None),
        tiny_config(yarn=YarnScaling(factor=8, beta_fast=16.5), num_nextn_predict_layers=0),
    ],
)  # fmt: skip
def test_to_official_is_read_back_equal(config: ModelConfig) -> None:
    raw = json.loads(json.dumps(to_official(config)))
    parsed = parse_config(raw)
    assert (parsed.config, parsed.dialect, parsed.unknown_keys) == (config, "official", ())


@pytest.mark.parametrize("raw", [FLASH_JSON, GOLDEN, to_official(PRO), to_official(tiny_config())])
def test_both_dialects_are_equal(raw: dict[str, Any]) -> None:
    theirs = transformers_json(raw)
    assert "layer_types" in theirs
    assert "compress_ratios" not in theirs
    parsed = parse_config(theirs)
    assert parsed.dialect == "transformers"
    assert parsed.config == parse_config(raw).config


@pytest.mark.parametrize("extra", [0, 1, 3, 8])
def test_entries_of_draft_blocks_are_ignored(extra: int) -> None:
    ratios = [*FLASH.compress_ratios, *[0] * extra]
    assert parse_config(FLASH_JSON | {"compress_ratios": ratios}).config == FLASH


@pytest.mark.parametrize(
    ("fields", "formats"),
    [
        ({}, ("mxfp4", "fp8")),
        ({"expert_dtype": "fp4"}, ("mxfp4", "fp8")),
        ({"expert_dtype": "fp8"}, ("fp8", "fp8")),
        ({"quantization_config": QUANT | {"expert_dtype": "fp8"}}, ("fp8", "fp8")),
        (
            {"quantization_config": QUANT | {"moe_quant_algo": "NVFP4", "group_size": 16}},
            ("nvfp4", "fp8"),
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            ("nvfp4", "fp8"),
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "modelopt",
                    "moe_quant_algo": "NVFP4",
                    "quant_algo": "MIXED_PRECISION",
                }
            },
            ("nvfp4", "fp8"),
        ),
        ({"expert_dtype": None}, ("mxfp4", "fp8")),
        (
            {"expert_dtype": None, "quantization_config": QUANT | {"expert_dtype": "fp8"}},
            ("fp8", "fp8"),
        ),
        ({"quantization_config": None}, ("bfloat16", "bfloat16")),
        ({"quantization_config": None, "torch_dtype": "float32"}, ("float32", "float32")),
        (
            {"quantization_config": None, "torch_dtype": None, "dtype": "torch.float32"},
            ("float32", "float32"),
        ),
    ],
)
def test_formats(fields: dict[str, Any], formats: tuple[str, str]) -> None:
    config = parse_config(FLASH_JSON | fields).config
    assert (config.expert_format, config.linear_format) == formats


def test_unknown_keys_are_returned_and_not_used() -> None:
    raw = FLASH_JSON | {"vision_n_layers": 27, "auto_map": {"AutoConfig": "x.Y"}, "zzz": None}
    parsed = parse_config(raw)
    assert parsed.config == FLASH
    assert parsed.unknown_keys == ("vision_n_layers", "zzz")


def test_the_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        FLASH.hidden_size = 1  # type: ignore[misc]


# ---- refusals: (fields set in config.json, the field that the error names)

YARN = FLASH_JSON["rope_scaling"]
REFUSED = [
    ({"model_type": "deepseek_v3"}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ({"scoring_func": "sigmoid"}, "scoring_func"),
    ({"topk_method": "greedy"}, "topk_method"),
    ({"norm_topk_prob": False}, "norm_topk_prob"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"n_group": 8}, "n_group"),
    ({"topk_group": 4}, "topk_group"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"vocab_size": 1 << 30}, "vocab_size"),
    ({"hidden_size": 1 << 20}, "hidden_size"),
    ({"hidden_size": "4096"}, "hidden_size"),
    ({"hidden_size": 4096.0}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"num_hidden_layers": None}, "num_hidden_layers"),
    ({"num_attention_heads": 60}, "o_groups"),
    ({"head_dim": 1}, "head_dim"),
    ({"head_dim": 32}, "qk_rope_head_dim"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
    ({"q_lora_rank": 0}, "q_lora_rank"),
    ({"o_groups": 7}, "o_groups"),
    ({"o_lora_rank": -4}, "o_lora_rank"),
    ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
    ({"n_routed_experts": 0}, "n_routed_experts"),
    ({"n_routed_experts": 5}, "num_experts_per_tok"),
    ({"n_shared_experts": 2}, "n_shared_experts"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
    ({"num_experts_per_tok": 65}, "num_experts_per_tok"),
    ({"num_hash_layers": 44}, "num_hash_layers"),
    ({"routed_scaling_factor": 0}, "routed_scaling_factor"),
    ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor"),
    ({"routed_scaling_factor": [1.5]}, "routed_scaling_factor"),
    ({"swiglu_limit": -10}, "swiglu_limit"),
    ({"swiglu_limit": float("nan")}, "swiglu_limit"),
    ({"hc_mult": 2}, "hc_mult"),
    ({"hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters"),
    ({"hc_eps": -1}, "hc_eps"),
    ({"rms_norm_eps": 2}, "rms_norm_eps"),
    ({"index_n_heads": 0}, "index_n_heads"),
    ({"index_head_dim": 96}, "index_head_dim"),
    ({"index_head_dim": 32}, "index_head_dim"),
    ({"index_topk": 0}, "index_topk"),
    ({"sliding_window": 0}, "sliding_window"),
    ({"rope_theta": 0.5}, "rope_theta"),
    ({"compress_rope_theta": 1e20}, "compress_rope_theta"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ({"num_nextn_predict_layers": 9}, "num_nextn_predict_layers"),
    ({"dspark_block_size": 65}, "dspark_block_size"),
    ({"bos_token_id": 129280}, "bos_token_id"),
    ({"eos_token_id": -1}, "eos_token_id"),
    ({"eos_token_id": [1, 2]}, "eos_token_id"),
    ({"compress_ratios": None}, "compress_ratios"),
    ({"compress_ratios": "0"}, "compress_ratios"),
    ({"compress_ratios": [0, 4]}, "compress_ratios"),
    ({"compress_ratios": [4] * 60}, "compress_ratios"),
    ({"compress_ratios": [4] * 44}, "compress_ratios"),
    ({"compress_ratios": [8] * 43}, "compress_ratios"),
    ({"compress_ratios": [False] * 43}, "compress_ratios"),
    ({"compress_ratios": ["4"] * 43}, "compress_ratios"),
    ({"compress_ratios": [[4]] * 43}, "compress_ratios"),
    ({"compress_ratios": [0.0] * 43}, "compress_ratios"),
    ({"compress_ratios": [4] * 43 + [0.0]}, "compress_ratios"),
    ({"compress_ratios": [4] * 43 + [False]}, "compress_ratios"),
    ({"rope_theta": 10**400}, "rope_theta"),
    ({"hc_eps": 10**400}, "hc_eps"),
    ({"hc_eps": -(10**400)}, "hc_eps"),
    ({"vocab_size": 10**5000}, "vocab_size"),
    ({"rope_scaling": YARN | {"factor": 10**400}}, "rope_scaling.factor"),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": 65536.5}},
     "rope_scaling.original_max_position_embeddings"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": YARN | {"rope_type": "default"}}, "rope_scaling.type"),
    ({"expert_dtype": "fp8", "quantization_config": QUANT | {"expert_dtype": "fp4"}},
     "expert_dtype"),
    ({"quantization_config": QUANT | {"quant_method": "modelopt"}},
     "quantization_config.quant_method"),
    ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
     "quantization_config.quant_method"),
    ({"rope_scaling": [1]}, "rope_scaling"),
    ({"rope_scaling": YARN | {"type": "linear"}}, "rope_scaling.type"),
    ({"rope_scaling": YARN | {"factor": 0}}, "rope_scaling.factor"),
    ({"rope_scaling": YARN | {"factor": "16"}}, "rope_scaling.factor"),
    ({"rope_scaling": YARN | {"mscale": 1.0}}, "rope_scaling.mscale"),
    ({"rope_scaling": YARN | {"attention_factor": 1.2}}, "rope_scaling.attention_factor"),
    ({"rope_scaling": YARN | {"beta_fast": 1}}, "rope_scaling.beta_fast"),
    ({"rope_scaling": {"type": "yarn", "factor": 16}},
     "rope_scaling.original_max_position_embeddings"),
    ({"torch_dtype": "float16", "quantization_config": None}, "torch_dtype"),
    ({"torch_dtype": "float32", "dtype": "bfloat16", "quantization_config": None}, "torch_dtype"),
    ({"expert_dtype": "int4"}, "expert_dtype"),
    ({"expert_dtype": ["fp4"]}, "expert_dtype"),
    ({"quantization_config": "fp8"}, "quantization_config"),
    ({"quantization_config": QUANT | {"quant_method": "gptq"}},
     "quantization_config.quant_method"),
    ({"quantization_config": QUANT | {"fmt": "e5m2"}}, "quantization_config.fmt"),
    ({"quantization_config": QUANT | {"scale_fmt": "float"}}, "quantization_config.scale_fmt"),
    ({"quantization_config": QUANT | {"weight_block_size": [64, 64]}},
     "quantization_config.weight_block_size"),
    ({"quantization_config": QUANT | {"moe_quant_algo": "W4A8"}},
     "quantization_config.moe_quant_algo"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "named"), REFUSED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_the_refused_field_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(FLASH_JSON | fields)
    assert caught.value.field == named
    assert caught.value.fix
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "name", sorted(k for k in FLASH_JSON if k in ModelConfig.__dataclass_fields__)
)
def test_every_numeric_field_is_checked(name: str) -> None:
    """No field takes text, and none takes 10^30."""
    for value in ("many", 10**30):
        with pytest.raises(ConfigError) as caught:
            parse_config(FLASH_JSON | {name: value})
        assert caught.value.field == name


def test_yarn_is_off_only_where_the_file_says_so() -> None:
    assert parse_config(FLASH_JSON | {"rope_scaling": None}).config == replace(FLASH, yarn=None)
    with pytest.raises(ConfigError) as caught:
        parse_config({k: v for k, v in FLASH_JSON.items() if k != "rope_scaling"})
    assert caught.value.field == "rope_scaling"


BOTH = FLASH_JSON | {
    k: v for k, v in transformers_json(FLASH_JSON).items()
    if k in ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters",
             "partial_rotary_factor")
}  # fmt: skip
ROPE = BOTH["rope_parameters"]


def test_both_dialects_in_one_file_may_agree() -> None:
    parsed = parse_config(BOTH)
    assert (parsed.config, parsed.dialect) == (FLASH, "official")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layer_types": BOTH["layer_types"][::-1]}, "layer_types"),
        ({"layer_types": ["nothing"] * 43}, "layer_types"),
        ({"compress_rates": {"compressed_sparse_attention": 128}},
         "compress_rates.compressed_sparse_attention"),
        ({"compress_rates": []}, "compress_rates"),
        ({"mlp_layer_types": ["moe"] * 43}, "num_hash_layers"),
        ({"rope_parameters": ROPE | {"compress": {"rope_type": "default"}}}, "rope_scaling"),
        ({"rope_scaling": None}, "rope_scaling"),
        ({"rope_scaling": YARN | {"factor": 8}}, "rope_scaling"),
        ({"rope_theta": 5000}, "rope_theta"),
        ({"compress_rope_theta": 5000}, "compress_rope_theta"),
        ({"rope_parameters": []}, "rope_parameters"),
        ({"qk_rope_head_dim": 32}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ],
)  # fmt: skip
def test_dialects_that_contradict_each_other(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(BOTH | fields)
    assert caught.value.field == named


@pytest.mark.parametrize("name", ["hidden_size", "index_topk", "routed_scaling_factor"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({k: v for k, v in FLASH_JSON.items() if k != name})
    assert caught.value.field == name
    assert caught.value.fix == f"config.json lacks: {name}"


def transformers_refusals() -> list[tuple[dict[str, Any], str]]:
    raw = transformers_json(GOLDEN)
    rope = raw["rope_parameters"]
    return [
        ({"layer_types": raw["layer_types"][:-1]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 6}, "layer_types"),
        ({"layer_types": [["x"]] * 6}, "layer_types"),
        ({"layer_types": "sliding_attention"}, "layer_types"),
        ({"compress_rates": {"compressed_sparse_attention": 8}},
         "compress_rates.compressed_sparse_attention"),
        ({"compress_rates": [4, 128]}, "compress_rates"),
        ({"mlp_layer_types": ["moe", "hash_moe", *["moe"] * 4]}, "mlp_layer_types"),
        ({"mlp_layer_types": ["hash_moe"]}, "mlp_layer_types"),
        ({"rope_parameters": None}, "rope_parameters"),
        ({"rope_parameters": [1, 2]}, "rope_parameters"),
        ({"rope_scaling": None}, "rope_scaling"),
        ({"rope_parameters": rope | {"compress": {"factor": 16}}},
         "rope_parameters.compress.rope_type"),
        ({"rope_parameters": rope | {"compress": rope["compress"] | {"rope_type": "default"}}},
         "rope_parameters.compress.type"),
        ({"rope_parameters": rope | {"compress": {"rope_type": "default", "factor": 16}}},
         "rope_parameters.compress.factor"),
        ({"rope_parameters": rope["main"]}, "rope_parameters"),
        ({"rope_parameters": rope | {"main": 1}}, "rope_parameters.main"),
        ({"rope_parameters": rope | {"main": rope["main"] | {"rope_type": "linear"}}},
         "rope_parameters.main.rope_type"),
        ({"rope_parameters": rope | {"compress": rope["compress"] | {"factor": -1}}},
         "rope_scaling.factor"),
        ({"num_hash_layers": 5}, "num_hash_layers"),
    ]  # fmt: skip


@pytest.mark.parametrize(("fields", "named"), transformers_refusals())
def test_the_refused_field_of_the_transformers_dialect_is_named(
    fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(transformers_json(GOLDEN) | fields)
    assert caught.value.field == named


@pytest.mark.parametrize(
    "factor", [float("nan"), float("inf"), 10**400, 0, 1.5, 0.501, True, "1"], ids=lambda _: ""
)
def test_a_rotary_share_that_cannot_be(factor: object) -> None:
    raw = transformers_json(GOLDEN) | {"partial_rotary_factor": factor}
    with pytest.raises(ConfigError) as caught:
        parse_config({k: v for k, v in raw.items() if k != "qk_rope_head_dim"})
    assert caught.value.field == "partial_rotary_factor"
    with pytest.raises(ConfigError) as caught:
        parse_config({k: v for k, v in raw.items() if k != "qk_rope_head_dim"} | {"head_dim": "x"})
    assert caught.value.field in ("partial_rotary_factor", "head_dim")


def test_the_rotary_share_gives_the_rope_dims() -> None:
    raw = {k: v for k, v in transformers_json(GOLDEN).items() if k != "qk_rope_head_dim"}
    assert parse_config(raw).config.qk_rope_head_dim == 64
    with pytest.raises(ConfigError, match="rope_parameters"):
        parse_config(raw | {"rope_parameters": [1]})


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 10**5000, float("nan"), float("inf")],
    ids=["400 digits", "negative", "5000 digits", "nan", "inf"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p"])
def test_sampling_numbers_that_no_float_can_hold(name: str, value: float) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.argument == name


# ---- fuzz: whatever the file says, a ModelConfig or a ConfigError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.integers(300, 5000).map(lambda n: (-1) ** n * 10**n)
    | st.sampled_from([64.0, 65536.5, 0.5])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(
        [
            "yarn",
            "default",
            "fp8",
            "fp4",
            "moe",
            "hash_moe",
            "sliding_attention",
            "NVFP4",
            "modelopt",
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=7)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "rope_type",
                    "factor",
                    "main",
                    "compress",
                    "quant_method",
                    "quant_algo",
                    "partial_rotary_factor",
                    "rope_theta",
                ]
            )
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
BASES = [
    FLASH_JSON, GOLDEN, transformers_json(GOLDEN), to_official(tiny_config()), BOTH,
    {k: v for k, v in transformers_json(GOLDEN).items() if k != "qk_rope_head_dim"},
]  # fmt: skip


def paths(value: Any, prefix: tuple = ()) -> list[tuple]:
    """Every place in a JSON value that can be replaced."""
    found = [prefix] if prefix else []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:3])
    else:
        items = ()
    return found + [p for k, v in items for p in paths(v, (*prefix, k))]


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_any_change_gives_a_config_or_a_config_error(data: st.DataObject) -> None:
    raw = copy.deepcopy(data.draw(st.sampled_from(BASES)))
    for _ in range(data.draw(st.integers(1, 4))):
        *path, last = data.draw(st.sampled_from(paths(raw)))
        at = raw
        for key in path:
            at = at[key]
        if data.draw(st.booleans()) and isinstance(at, dict):
            del at[last]
        else:
            at[last] = data.draw(VALUES)
    try:
        config = parse_config(raw).config
    except ConfigError:
        return
    assert hash(config) == hash(replace(config))  # nothing mutable slipped in
    assert parse_config(json.loads(json.dumps(to_official(config)))).config == config


# Values that break a careless message or check; 5000 digits are more than Python prints.
HOSTILE = [10**5000, -(10**5000), 1e308, float("nan"), float("inf"), True, "", "x", [], {}, [{}]]


@pytest.mark.parametrize("base", BASES)
def test_a_hostile_value_in_any_place_gives_a_config_or_a_config_error(base: dict) -> None:
    for *path, last in paths(base):
        for value in HOSTILE:
            raw = copy.deepcopy(base)
            at = raw
            for key in path:
                at = at[key]
            at[last] = value
            with contextlib.suppress(ConfigError):
                parse_config(raw)


@given(VALUES)
def test_any_json_value_is_no_config(value: Any) -> None:
    with pytest.raises(Dsv4Error):
        parse_config(value)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_hidden_layers", "7", "an integer from 1 to 512"),
        ("num_hidden_layers", 0, "an integer from 1 to 512"),
        ("sliding_window", -1, "an integer from 1 to 1,048,576"),
        ("hidden_size", 1.5, "an integer from 1 to 131,072"),
        ("hc_mult", 3, "4"),
        ("rope_theta", "x", "a finite number from 1 to 1e+12"),
        ("routed_scaling_factor", 0, "a finite number from 1e-06 to 1e+06"),
    ],
)
def test_ranges_are_named_in_full(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_config(FLASH_JSON | {field: value})
    assert e.value.expected == expected


def test_one_problem_more_is_in_the_singular() -> None:
    from dsv4.core.errors import CheckpointError, CheckpointProblem

    def text(count: int) -> str:
        return str(CheckpointError.of(CheckpointProblem("k", "f", "", "d") for _ in range(count)))

    assert text(21).endswith("... and 1 more problem")
    assert text(22).endswith("... and 2 more problems")
