"""config.json in its two dialects, normalised once into a ModelConfig.

The official dialect has `compress_ratios`, `num_hash_layers` and `rope_scaling`; transformers 5
writes `layer_types`, `compress_rates`, `mlp_layer_types` and a nested `rope_parameters`. A file
that has fields of both is read both ways, and both readings must agree. Nothing in the file is
ever acted on beyond the fields read here: unknown keys are returned, not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dsv4.core.config import ModelConfig, YarnScaling, legal_range
from dsv4.core.errors import ConfigError, shown
from dsv4.core.numbers import is_finite_number, is_integer

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
    is_official = _has(raw, "compress_ratios") or not _has(raw, "layer_types")
    values = {name: raw[name] for name in _DIRECT if _has(raw, name)}
    values |= _read_schedule(raw, is_official) | _read_mlp_types(raw)
    values |= _read_rope_dim(raw) | _read_rope(raw, is_official) | _read_formats(raw)
    missing = [
        f.name for f in fields(ModelConfig)
        if f.name not in values and f.name in _required()
    ]  # fmt: skip
    if missing:
        raise ConfigError(missing[0], "a value", None, "config.json lacks: " + ", ".join(missing))
    unknown = sorted(str(k) for k in set(raw) - _NEUTRAL - set(_FIXED) - set(_DIRECT))
    dialect = "official" if is_official else "transformers"
    return ParsedConfig(ModelConfig(**values), dialect, tuple(unknown))


def _has(raw: Mapping[str, Any], name: str) -> bool:
    """Whether the file says anything about `name`; null says nothing."""
    return raw.get(name) is not None


def _required() -> set[str]:
    from dataclasses import MISSING

    return {f.name for f in fields(ModelConfig) if f.default is MISSING}


def _num_layers(raw: Mapping[str, Any]) -> int:
    layers: Any = raw.get("num_hidden_layers")
    if not is_integer(layers) or not 1 <= layers <= 512:
        raise ConfigError("num_hidden_layers", legal_range("num_hidden_layers"), layers)
    return layers


def _sequence(raw: Mapping[str, Any], name: str) -> list[Any]:
    value = raw.get(name)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(name, "a list", value)
    return list(value)


def _read_schedule(raw: Mapping[str, Any], is_official: bool) -> dict[str, Any]:
    L = _num_layers(raw)
    ours = _read_ratios(raw, L) if is_official else None
    theirs = _read_layer_types(raw, L) if _has(raw, "layer_types") else None
    if ours is not None and theirs is not None and ours != theirs:
        raise ConfigError("layer_types", f"the schedule of compress_ratios {shown(ours)}", theirs)
    rates = raw.get("compress_rates")
    if rates is not None and not isinstance(rates, Mapping):
        raise ConfigError("compress_rates", "an object", rates)
    for kind, rate in (rates or {}).items():
        if not is_integer(rate) or _LAYER_RATIO.get(kind) != rate:
            raise ConfigError(f"compress_rates.{kind}", str(_LAYER_RATIO.get(kind)), rate)
    return {"compress_ratios": theirs if ours is None else ours}


def _read_ratios(raw: Mapping[str, Any], L: int) -> tuple[Any, ...]:
    ratios = _sequence(raw, "compress_ratios")
    if not L <= len(ratios) <= L + 8:
        raise ConfigError(
            "compress_ratios", f"{L} to {L + 8} entries, one per layer and MTP block", ratios
        )
    if any(not is_integer(r) or r != 0 for r in ratios[L:]):
        raise ConfigError("compress_ratios", "0 for the entries of MTP blocks", ratios[L:])
    return tuple(ratios[:L])


def _read_layer_types(raw: Mapping[str, Any], L: int) -> tuple[int, ...]:
    kinds = _sequence(raw, "layer_types")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _LAYER_RATIO:
            raise ConfigError("layer_types", f"one of {tuple(_LAYER_RATIO)}", kind)
    if len(kinds) != L:
        raise ConfigError("layer_types", f"{L} entries", kinds)
    return tuple(_LAYER_RATIO[k] for k in kinds)


def _read_mlp_types(raw: Mapping[str, Any]) -> dict[str, Any]:
    if not _has(raw, "mlp_layer_types"):
        return {}
    L, kinds = _num_layers(raw), _sequence(raw, "mlp_layer_types")
    num_hash = sum(kind == "hash_moe" for kind in kinds)
    if kinds != ["hash_moe"] * num_hash + ["moe"] * (L - num_hash):
        raise ConfigError(
            "mlp_layer_types", f"'hash_moe' layers first, then 'moe', {L} in all", kinds
        )
    if raw.get("num_hash_layers") not in (None, num_hash):
        raise ConfigError("num_hash_layers", f"{num_hash}, as in mlp_layer_types",
                          raw["num_hash_layers"])  # fmt: skip
    return {"num_hash_layers": num_hash}


def _read_rope_dim(raw: Mapping[str, Any]) -> dict[str, Any]:
    """qk_rope_head_dim, or the same as a share of head_dim, at up to three places."""
    name = "partial_rotary_factor"
    head_dim: Any = raw.get("head_dim")
    rope: Any = raw.get("rope_parameters")
    groups = [g for g in rope.values() if isinstance(g, Mapping)] if _is_object(rope) else []
    shares = [g[name] for g in (raw, *groups) if _has(g, name)]
    if not shares:
        return {}
    if not is_integer(head_dim) or not 1 <= head_dim <= 8192:
        raise ConfigError("head_dim", f"an integer beside {name}", head_dim)
    wanted = raw.get("qk_rope_head_dim")
    for share in shares:
        if not is_finite_number(share) or not 0 < share <= 1:
            raise ConfigError(name, "more than 0, at most 1", share)
        dim = round(share * head_dim)
        if abs(share * head_dim - dim) > 1e-6:
            raise ConfigError(name, f"a whole part of head_dim {head_dim}", share)
        wanted = dim if wanted is None else wanted
        if wanted != dim:
            raise ConfigError(name, f"{shown(wanted)} of {head_dim} dims, as said elsewhere", share)
    return {"qk_rope_head_dim": wanted}


def _read_rope(raw: Mapping[str, Any], is_official: bool) -> dict[str, Any]:
    """YaRN and the two bases. YaRN is off only where the file says so."""
    theirs = None
    if _has(raw, "rope_parameters") or not is_official:
        theirs = _read_rope_parameters(raw)
    if "rope_scaling" not in raw:
        if theirs is None:
            raise ConfigError("rope_scaling", "an object, or null for no YaRN", "nothing")
        return theirs
    scaling = raw["rope_scaling"]
    yarn = None if scaling is None else _read_yarn("rope_scaling", scaling)
    if theirs is None:
        return {"yarn": yarn}
    if theirs["yarn"] != yarn:
        wanted = shown(theirs["yarn"])
        raise ConfigError("rope_scaling", f"{wanted}, as in rope_parameters", scaling)
    return theirs


def _read_rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    rope: Any = raw.get("rope_parameters")
    if not _is_object(rope) or not {"main", "compress"} <= set(rope):
        raise ConfigError("rope_parameters", "an object with 'main' and 'compress'", rope)
    main, compress = rope["main"], rope["compress"]
    for name, group in (("main", main), ("compress", compress)):
        if not _is_object(group):
            raise ConfigError(f"rope_parameters.{name}", "an object", group)
    if _rope_kind("rope_parameters.main", main) not in (None, "default"):
        raise ConfigError("rope_parameters.main.rope_type", "'default'", main.get("rope_type"))
    out: dict[str, Any] = {}
    for name, group in (("rope_theta", main), ("compress_rope_theta", compress)):
        theta = group.get("rope_theta")
        if theta is not None:
            out[name] = theta
            if raw.get(name) not in (None, theta):
                raise ConfigError(name, f"{shown(theta)}, as in rope_parameters", raw[name])
    field = "rope_parameters.compress"
    kind = _rope_kind(field, compress)
    if kind is None:
        raise ConfigError(f"{field}.rope_type", "'yarn' or 'default'", None)
    if kind == "default":
        for f in fields(YarnScaling):
            if _has(compress, f.name):
                raise ConfigError(f"{field}.{f.name}", "absent beside 'default'", compress[f.name])
    return out | {"yarn": None if kind == "default" else _read_yarn(field, compress)}


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _rope_kind(field: str, group: Mapping[str, Any]) -> Any:
    """`rope_type`, or `type` as older files spell it; None without either."""
    new, old = group.get("rope_type"), group.get("type")
    if new is not None and old is not None and new != old:
        raise ConfigError(f"{field}.type", f"{shown(new)}, as in rope_type", old)
    return old if new is None else new


def _read_yarn(field: str, raw: Any) -> YarnScaling:
    if not _is_object(raw):
        raise ConfigError(field, "an object", raw)
    kind = _rope_kind(field, raw)
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
    return YarnScaling(**{n: raw[n] for n in names if _has(raw, n)})


def _read_formats(raw: Mapping[str, Any]) -> dict[str, Any]:
    quant: Any = raw.get("quantization_config")
    if quant is None:
        plain = _plain_dtype(raw)
        return {"expert_format": plain, "linear_format": plain}
    if not _is_object(quant):
        raise ConfigError("quantization_config", "an object", quant)
    algo = quant.get("moe_quant_algo")
    is_nvfp4 = (quant.get("quant_algo") if algo is None else algo) == "NVFP4"
    for name, legal in (
        ("quant_method", ("fp8", "modelopt") if is_nvfp4 else ("fp8",)),
        ("fmt", ("e4m3", None)),
        ("scale_fmt", ("ue8m0", None)),
        ("weight_block_size", ([128, 128], (128, 128), None)),
        ("moe_quant_algo", ("NVFP4", None)),
    ):
        if quant.get(name) not in legal:
            raise ConfigError(f"quantization_config.{name}", repr(legal[0]), quant.get(name))
    if is_nvfp4:
        return {"expert_format": "nvfp4", "linear_format": "fp8"}
    said = [x["expert_dtype"] for x in (raw, quant) if _has(x, "expert_dtype")]
    experts = said[0] if said else "fp4"
    if experts not in ("fp4", "fp8"):
        raise ConfigError("expert_dtype", "'fp4' or 'fp8'", experts)
    if any(x != experts for x in said):
        raise ConfigError("expert_dtype", f"{shown(said[-1])}, as in quantization_config", experts)
    return {"expert_format": {"fp4": "mxfp4", "fp8": "fp8"}[experts], "linear_format": "fp8"}


def _dtype_name(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _plain_dtype(raw: Mapping[str, Any]) -> Any:
    said = [_dtype_name(raw[n]) for n in ("torch_dtype", "dtype") if _has(raw, n)]
    plain = said[0] if said else "bfloat16"
    if plain not in ("bfloat16", "float32"):
        raise ConfigError("torch_dtype", "'bfloat16' or 'float32'", plain)
    if any(x != plain for x in said):
        raise ConfigError("torch_dtype", f"{shown(said[-1])}, as in dtype", plain)
    return plain


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
