"""config.json in its two dialects, normalised once into a ModelConfig.

The official dialect has `compress_ratios`, `num_hash_layers` and `rope_scaling`; transformers 5
writes `layer_types`, `compress_rates`, `mlp_layer_types` and a nested `rope_parameters`. Nothing
in the file is ever acted on beyond the fields read here: unknown keys are returned, not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dsv4.core.config import ModelConfig, YarnScaling
from dsv4.core.errors import ConfigError

MODEL_TYPE = "deepseek_v4"

# Fields with one legal value. A file that says otherwise is another model.
_FIXED: dict[str, tuple[Any, ...]] = {
    "num_key_value_heads": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "tie_word_embeddings": (False,),
    "n_group": (1, None),
    "topk_group": (1, None),
}

# Known keys that say nothing about the mathematics of inference.
_NEUTRAL = frozenset(
    {
        "architectures", "model_type", "torch_dtype", "dtype", "use_cache", "transformers_version",
        "initializer_range", "pad_token_id", "auto_map", "_name_or_path", "quantization_config",
        "expert_dtype", "rope_scaling", "rope_parameters", "compress_ratios", "compress_rates",
        "layer_types", "mlp_layer_types", "partial_rotary_factor", "dspark_markov_rank",
        "dspark_noise_token_id", "dspark_target_layer_ids", "return_dict", "output_hidden_states",
        "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder", "id2label",
        "label2id", "problem_type", "router_jitter_noise", "router_aux_loss_coef",
        "output_router_logits", "attn_implementation", "num_local_experts", "mlp_bias",
        "default_theta",
    }
)  # fmt: skip
_DIRECT = tuple(
    f.name
    for f in fields(ModelConfig)
    if f.name not in ("compress_ratios", "yarn", "expert_format", "linear_format")
)
_LAYER_RATIO = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}


@dataclass(frozen=True)
class ParsedConfig:
    """A normalised config, which dialect it came in, and the keys that were not understood."""

    config: ModelConfig
    dialect: str
    unknown_keys: tuple[str, ...]


def parse_config(raw: Mapping[str, Any]) -> ParsedConfig:
    """Normalise the mapping read from config.json.

    Raises ConfigError for a wrong model type, a missing or contradictory field, or a value that
    DeepSeek-V4 does not have.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError("config.json", "a JSON object", type(raw).__name__)
    if raw.get("model_type") != MODEL_TYPE:
        raise ConfigError("model_type", repr(MODEL_TYPE), raw.get("model_type"))
    for name, legal in _FIXED.items():
        if name in raw and raw[name] not in legal:
            raise ConfigError(name, repr(legal[0]), raw[name])
    transformers = "layer_types" in raw and "compress_ratios" not in raw
    read = _read_transformers if transformers else _read_official
    values = {name: raw[name] for name in _DIRECT if raw.get(name) is not None}
    values |= read(raw) | _read_formats(raw)
    missing = [
        f.name for f in fields(ModelConfig)
        if f.name not in values and f.name in _required()
    ]  # fmt: skip
    if missing:
        raise ConfigError(missing[0], "a value", None, "config.json lacks: " + ", ".join(missing))
    unknown = sorted(set(raw) - _NEUTRAL - set(_FIXED) - set(_DIRECT))
    dialect = "transformers" if transformers else "official"
    return ParsedConfig(ModelConfig(**values), dialect, tuple(unknown))


def _required() -> set[str]:
    from dataclasses import MISSING

    return {f.name for f in fields(ModelConfig) if f.default is MISSING}


def _num_layers(raw: Mapping[str, Any]) -> int:
    layers = raw.get("num_hidden_layers")
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= 512:
        raise ConfigError("num_hidden_layers", "1 to 512", layers)
    return layers


def _sequence(raw: Mapping[str, Any], name: str) -> list[Any]:
    value = raw.get(name)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(name, "a list", value)
    return list(value)


def _read_official(raw: Mapping[str, Any]) -> dict[str, Any]:
    L = _num_layers(raw)
    ratios = _sequence(raw, "compress_ratios")
    if not L <= len(ratios) <= L + 8:
        raise ConfigError(
            "compress_ratios", f"{L} to {L + 8} entries, one per layer and MTP block", ratios
        )
    if any(ratios[L:]):
        raise ConfigError("compress_ratios", "0 for the entries of MTP blocks", ratios[L:])
    out: dict[str, Any] = {"compress_ratios": tuple(ratios[:L])}
    scaling = raw.get("rope_scaling")
    out["yarn"] = None if scaling is None else _read_yarn("rope_scaling", scaling)
    if isinstance(raw.get("rope_parameters"), Mapping):
        out |= _read_rope_parameters(raw)
    return out


def _read_transformers(raw: Mapping[str, Any]) -> dict[str, Any]:
    L = _num_layers(raw)
    kinds = _sequence(raw, "layer_types")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _LAYER_RATIO:
            raise ConfigError("layer_types", f"one of {tuple(_LAYER_RATIO)}", kind)
    if len(kinds) != L:
        raise ConfigError("layer_types", f"{L} entries", kinds)
    rates = raw.get("compress_rates") or {}
    if not isinstance(rates, Mapping):
        raise ConfigError("compress_rates", "an object", rates)
    for kind, rate in rates.items():
        if _LAYER_RATIO.get(kind) != rate:
            raise ConfigError(f"compress_rates.{kind}", str(_LAYER_RATIO.get(kind)), rate)
    out: dict[str, Any] = {"compress_ratios": tuple(_LAYER_RATIO[k] for k in kinds)}
    out |= _read_mlp_types(raw, L)
    if "qk_rope_head_dim" not in raw:
        out["qk_rope_head_dim"] = _rope_dim(raw)
    return out | _read_rope_parameters(raw)


def _read_mlp_types(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    if "mlp_layer_types" not in raw:
        return {}
    kinds = _sequence(raw, "mlp_layer_types")
    num_hash = sum(kind == "hash_moe" for kind in kinds)
    expected = ["hash_moe"] * num_hash + ["moe"] * (num_layers - num_hash)
    if kinds != expected:
        raise ConfigError(
            "mlp_layer_types", f"'hash_moe' layers first, then 'moe', {num_layers} in all", kinds
        )
    if raw.get("num_hash_layers") not in (None, num_hash):
        raise ConfigError("num_hash_layers", f"{num_hash}, as in mlp_layer_types",
                          raw["num_hash_layers"])  # fmt: skip
    return {"num_hash_layers": num_hash}


def _rope_dim(raw: Mapping[str, Any]) -> int:
    factor, head_dim = raw.get("partial_rotary_factor"), raw.get("head_dim")
    for group in (raw.get("rope_parameters") or {}).values():
        if factor is None and isinstance(group, Mapping):
            factor = group.get("partial_rotary_factor")
    if not isinstance(factor, (int, float)) or not isinstance(head_dim, int):
        raise ConfigError("partial_rotary_factor", "a number beside head_dim", factor)
    return round(factor * head_dim)


def _read_rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    rope = raw.get("rope_parameters")
    if not isinstance(rope, Mapping) or not {"main", "compress"} <= set(rope):
        raise ConfigError("rope_parameters", "an object with 'main' and 'compress'", rope)
    main, compress = rope["main"], rope["compress"]
    for name, group in (("main", main), ("compress", compress)):
        if not isinstance(group, Mapping):
            raise ConfigError(f"rope_parameters.{name}", "an object", group)
    if main.get("rope_type", "default") != "default":
        raise ConfigError("rope_parameters.main.rope_type", "'default'", main.get("rope_type"))
    out: dict[str, Any] = {}
    if "rope_theta" in main:
        out["rope_theta"] = main["rope_theta"]
    if "rope_theta" in compress:
        out["compress_rope_theta"] = compress["rope_theta"]
    kind = compress.get("rope_type", compress.get("type", "default"))
    out["yarn"] = None if kind == "default" else _read_yarn("rope_parameters.compress", compress)
    return out


def _read_yarn(field: str, raw: Any) -> YarnScaling:
    if not isinstance(raw, Mapping):
        raise ConfigError(field, "an object", raw)
    kind = raw.get("rope_type", raw.get("type"))
    if kind != "yarn":
        raise ConfigError(f"{field}.type", "'yarn'", kind)
    for name in ("mscale", "mscale_all_dim"):
        if raw.get(name) not in (None, 0, 0.0):
            raise ConfigError(f"{field}.{name}", "absent: DSV4 has no magnitude scale", raw[name])
    if raw.get("attention_factor") not in (None, 1, 1.0):
        raise ConfigError(f"{field}.attention_factor", "1.0 or absent", raw["attention_factor"])
    names = [f.name for f in fields(YarnScaling)]
    for name in ("factor", "original_max_position_embeddings"):
        if name not in raw:
            raise ConfigError(f"{field}.{name}", "a number", None)
    return YarnScaling(**{n: raw[n] for n in names if raw.get(n) is not None})


def _read_formats(raw: Mapping[str, Any]) -> dict[str, Any]:
    quant = raw.get("quantization_config")
    plain = str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16").removeprefix("torch.")
    if quant is None:
        if plain not in ("bfloat16", "float32"):
            raise ConfigError("torch_dtype", "'bfloat16' or 'float32'", plain)
        return {"expert_format": plain, "linear_format": plain}
    if not isinstance(quant, Mapping):
        raise ConfigError("quantization_config", "an object", quant)
    for name, legal in (
        ("quant_method", ("fp8",)),
        ("fmt", ("e4m3", None)),
        ("scale_fmt", ("ue8m0", None)),
        ("weight_block_size", ([128, 128], (128, 128), None)),
    ):
        if quant.get(name) not in legal:
            raise ConfigError(f"quantization_config.{name}", repr(legal[0]), quant.get(name))
    if quant.get("moe_quant_algo") is not None:
        if quant["moe_quant_algo"] != "NVFP4":
            raise ConfigError("quantization_config.moe_quant_algo", "'NVFP4'",
                              quant["moe_quant_algo"])  # fmt: skip
        return {"expert_format": "nvfp4", "linear_format": "fp8"}
    experts = raw.get("expert_dtype", quant.get("expert_dtype", "fp4"))
    if experts not in ("fp4", "fp8"):
        raise ConfigError("expert_dtype", "'fp4' or 'fp8'", experts)
    return {"expert_format": {"fp4": "mxfp4", "fp8": "fp8"}[experts], "linear_format": "fp8"}


def to_official(config: ModelConfig) -> dict[str, Any]:
    """The config.json of `config` in the official dialect; parse_config reads it back equal."""
    c = config
    out: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": MODEL_TYPE}
    out |= {name: getattr(c, name) for name in _DIRECT if name != "dspark_block_size"}
    out["compress_ratios"] = [*c.compress_ratios, *[0] * c.num_nextn_predict_layers]
    out |= {k: v[0] for k, v in _FIXED.items() if k not in ("n_group", "topk_group")}
    out["rope_scaling"] = None if c.yarn is None else {"type": "yarn"} | {
        f.name: getattr(c.yarn, f.name) for f in fields(YarnScaling)
    }  # fmt: skip
    if c.dspark_block_size:
        out["dspark_block_size"] = c.dspark_block_size
    if c.linear_format != "fp8":
        return out | {"torch_dtype": c.linear_format}
    quant: dict[str, Any] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
    }  # fmt: skip
    if c.expert_format == "nvfp4":
        quant |= {"moe_quant_algo": "NVFP4", "group_size": 16}
    elif c.expert_format in ("mxfp4", "fp8"):
        out["expert_dtype"] = "fp4" if c.expert_format == "mxfp4" else "fp8"
    else:
        raise ConfigError("expert_format", "quantised beside FP8 linears", c.expert_format)
    return out | {"torch_dtype": "bfloat16", "quantization_config": quant}
