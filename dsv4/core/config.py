"""ModelConfig: the one description of a DeepSeek-V4 model that every layer reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from dsv4.core.errors import ConfigError
from dsv4.core.numbers import is_finite_number, is_integer


class LayerKind(Enum):
    """What the attention of a layer sees beside its sliding window."""

    SWA = 0  # nothing
    CSA = 4  # compressed sparse: ratio 4, overlapping windows, top-k by the indexer
    HCA = 128  # heavily compressed: ratio 128, every entry

    @property
    def ratio(self) -> int:
        return self.value


@dataclass(frozen=True)
class YarnScaling:
    """YaRN parameters of the rotary table of compressed layers. DSV4 has no magnitude scale."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the mathematics and the tensor shapes of a checkpoint.

    Field names are those of the official config.json. `compress_ratios` has one entry per trunk
    layer; MTP blocks are always SWA. `expert_format` is "mxfp4", "nvfp4", "fp8", "bfloat16" or
    "float32", `linear_format` "fp8", "bfloat16" or "float32": how the file stores them.

    Raises ConfigError when a field is out of range or two fields contradict each other.
    Source: config.json of DeepSeek-V4-Flash and -Pro (2026-04-24).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    compress_ratios: tuple[int, ...]
    n_shared_experts: int = 1
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    sliding_window: int = 128
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn: YarnScaling | None = YarnScaling()
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 1
    dspark_block_size: int = 0
    bos_token_id: int = 0
    eos_token_id: int = 1
    expert_format: str = "mxfp4"
    linear_format: str = "fp8"

    def __post_init__(self) -> None:
        _check_types(self)
        _check_ranges(self)
        _check_consistency(self)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read the mapping of a config.json, official or transformers dialect."""
        from dsv4.core.config_dialects import parse_config

        return parse_config(raw).config

    @classmethod
    def flash(cls) -> ModelConfig:
        """DeepSeek-V4-Flash: 43 layers, 256 experts, 284 B parameters in the trunk."""
        return cls(
            vocab_size=129280, hidden_size=4096, num_hidden_layers=43, num_attention_heads=64,
            head_dim=512, qk_rope_head_dim=64, q_lora_rank=1024, o_groups=8, o_lora_rank=1024,
            moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=6,
            num_hash_layers=3, routed_scaling_factor=1.5, swiglu_limit=10.0, index_n_heads=64,
            index_head_dim=128, index_topk=512, compress_ratios=(0, 0, *(4, 128) * 20, 4),
        )  # fmt: skip

    @classmethod
    def pro(cls) -> ModelConfig:
        """DeepSeek-V4-Pro: 61 layers, 384 experts, 1.57 T parameters in the trunk."""
        return cls(
            vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128,
            head_dim=512, qk_rope_head_dim=64, q_lora_rank=1536, o_groups=16, o_lora_rank=1024,
            moe_intermediate_size=3072, n_routed_experts=384, num_experts_per_tok=6,
            num_hash_layers=3, routed_scaling_factor=2.5, swiglu_limit=10.0, index_n_heads=64,
            index_head_dim=128, index_topk=1024, compress_ratios=(128, 128, *(4, 128) * 29, 4),
        )  # fmt: skip

    @classmethod
    def nano(cls) -> ModelConfig:
        """dsv4-nano, the trained checkpoint that the package bundles."""
        return cls(
            vocab_size=4096, hidden_size=256, num_hidden_layers=7, num_attention_heads=8,
            head_dim=512, qk_rope_head_dim=64, q_lora_rank=128, o_groups=2, o_lora_rank=128,
            moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=6,
            num_hash_layers=3, routed_scaling_factor=1.5, swiglu_limit=10.0, index_n_heads=8,
            index_head_dim=128, index_topk=32, compress_ratios=(0, 0, 4, 128, 4, 128, 4),
        )  # fmt: skip

    def layer_kind(self, layer: int) -> LayerKind:
        """The attention kind of trunk layer `layer`; MTP blocks, numbered from L on, are SWA."""
        in_trunk = layer < self.num_hidden_layers
        return LayerKind(self.compress_ratios[layer]) if in_trunk else LayerKind.SWA

    def is_hash_layer(self, layer: int) -> bool:
        """Whether layer `layer` picks its experts by token id instead of by score."""
        return layer < self.num_hash_layers

    @property
    def nope_head_dim(self) -> int:
        """The leading dims of a head that RoPE leaves alone (448)."""
        return self.head_dim - self.qk_rope_head_dim


MAX_LAYERS, MAX_EXPERTS, MAX_WIDTH, MAX_VOCAB = 512, 4096, 1 << 17, 1 << 24
MAX_CONTEXT = 1 << 30
EXPERT_FORMATS = ("mxfp4", "nvfp4", "fp8", "bfloat16", "float32")
LINEAR_FORMATS = ("fp8", "bfloat16", "float32")

# Bounds far above any published model, so that no product of two fields can overflow or ask for
# absurd memory before the checkpoint itself has been looked at.
_RANGES: dict[str, tuple[float, float]] = {
    "vocab_size": (1, MAX_VOCAB),
    "hidden_size": (1, MAX_WIDTH),
    "num_hidden_layers": (1, MAX_LAYERS),
    "num_attention_heads": (1, 4096),
    "head_dim": (2, 8192),
    "qk_rope_head_dim": (2, 8192),
    "q_lora_rank": (1, MAX_WIDTH),
    "o_groups": (1, 4096),
    "o_lora_rank": (1, MAX_WIDTH),
    "moe_intermediate_size": (1, MAX_WIDTH),
    "n_routed_experts": (1, MAX_EXPERTS),
    "num_experts_per_tok": (1, 64),
    "num_hash_layers": (0, MAX_LAYERS),
    "n_shared_experts": (1, 1),
    "routed_scaling_factor": (1e-6, 1e6),
    "swiglu_limit": (1e-6, 1e9),
    "index_n_heads": (1, 4096),
    "index_head_dim": (2, 8192),
    "index_topk": (1, 1 << 20),
    "hc_mult": (4, 4),
    "hc_sinkhorn_iters": (1, 1000),
    "hc_eps": (0, 1),
    "rms_norm_eps": (0, 1),
    "sliding_window": (1, 1 << 20),
    "rope_theta": (1, 1e12),
    "compress_rope_theta": (1, 1e12),
    "max_position_embeddings": (1, MAX_CONTEXT),
    "num_nextn_predict_layers": (0, 1),
    "dspark_block_size": (0, 64),
    "bos_token_id": (0, MAX_VOCAB),
    "eos_token_id": (0, MAX_VOCAB),
}


def _check_types(c: ModelConfig) -> None:
    for f in fields(c):
        value = getattr(c, f.name)
        is_legal = {"int": is_integer, "float": is_finite_number}.get(str(f.type))
        if is_legal is not None and not is_legal(value):
            raise ConfigError(f.name, legal_range(f.name), value)
    if not isinstance(c.compress_ratios, tuple):
        raise ConfigError("compress_ratios", "a tuple of integers", c.compress_ratios)


def legal_range(name: str) -> str:
    """What a field of a ModelConfig takes, in words."""
    low, high = _RANGES[name]
    if low == high:
        return f"{low}"
    if ModelConfig.__dataclass_fields__[name].type == "int":
        return f"an integer from {low:,} to {high:,}"
    return f"a finite number from {low:g} to {high:g}"


def _check_ranges(c: ModelConfig) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(c, name)
        if not low <= value <= high:
            raise ConfigError(name, legal_range(name), value)
    if c.expert_format not in EXPERT_FORMATS:
        raise ConfigError("expert_format", f"one of {EXPERT_FORMATS}", c.expert_format)
    if c.linear_format not in LINEAR_FORMATS:
        raise ConfigError("linear_format", f"one of {LINEAR_FORMATS}", c.linear_format)
    if c.yarn is not None:
        _check_yarn(c.yarn)


def _span(low: float, high: float) -> str:
    whole = isinstance(high, int)
    return f"{low:,} to {high:,}" if whole else f"{low:g} to {high:g}"


def _check_yarn(y: YarnScaling) -> None:
    for name, low, high in (
        ("factor", 1, 1e6),
        ("original_max_position_embeddings", 1, MAX_CONTEXT),
        ("beta_fast", 1e-6, 1e6),
        ("beta_slow", 1e-6, 1e6),
    ):
        value = getattr(y, name)
        if not is_finite_number(value):
            raise ConfigError(f"rope_scaling.{name}", "a finite number", value)
        if not low <= value <= high:
            raise ConfigError(f"rope_scaling.{name}", _span(low, high), value)
    if not is_integer(y.original_max_position_embeddings):
        raise ConfigError(
            "rope_scaling.original_max_position_embeddings", "an integer",
            y.original_max_position_embeddings,
        )  # fmt: skip
    if y.beta_fast <= y.beta_slow:
        raise ConfigError(
            "rope_scaling.beta_fast", f"more than beta_slow {y.beta_slow}", y.beta_fast
        )


def _check_consistency(c: ModelConfig) -> None:
    L = c.num_hidden_layers
    if len(c.compress_ratios) != L:
        raise ConfigError("compress_ratios", f"{L} entries, one per layer", c.compress_ratios)
    for ratio in c.compress_ratios:
        if not is_integer(ratio) or ratio not in (0, 4, 128):
            raise ConfigError("compress_ratios", "only the integers 0, 4 and 128", ratio)
    if c.num_hash_layers > L:
        raise ConfigError(
            "num_hash_layers", f"at most {L}, the number of layers", c.num_hash_layers
        )
    if c.num_experts_per_tok > c.n_routed_experts:
        raise ConfigError(
            "num_experts_per_tok", f"at most n_routed_experts {c.n_routed_experts}",
            c.num_experts_per_tok,
        )  # fmt: skip
    if c.qk_rope_head_dim % 2 or c.qk_rope_head_dim > c.head_dim:
        raise ConfigError("qk_rope_head_dim", f"even, at most {c.head_dim}", c.qk_rope_head_dim)
    if c.index_head_dim < c.qk_rope_head_dim:
        raise ConfigError(
            "index_head_dim", f"at least qk_rope_head_dim {c.qk_rope_head_dim}", c.index_head_dim
        )
    if c.index_head_dim & (c.index_head_dim - 1):
        raise ConfigError("index_head_dim", "a power of two (Hadamard)", c.index_head_dim)
    if c.num_attention_heads % c.o_groups:
        raise ConfigError("o_groups", f"a divisor of {c.num_attention_heads} heads", c.o_groups)
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(c, name) >= c.vocab_size:
            raise ConfigError(name, f"below vocab_size {c.vocab_size}", getattr(c, name))
