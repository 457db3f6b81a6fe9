"""Every tensor a checkpoint must hold, with dtype and shape, computed from the config alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.formats import FP8_BLOCK128, MXFP4, NVFP4, BlockScaledFormat

DTYPE_BYTES = {"BF16": 2, "F32": 4, "I64": 8, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1}
_PLAIN = {"bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor as the official checkpoint stores it.

    name       the official key, "layers.2.attn.wq_a.scale"
    dtype      safetensors dtype name
    shape      stored shape (FP4 payloads count bytes, not elements)
    parameter  the logical parameter it belongs to, "layers.2.attn.wq_a.weight"
    format     the block-scaled format of that parameter, or None
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameter: str
    format: BlockScaledFormat | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def tensor_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """All tensors of the official checkpoint of `config`, by name, in file order.

    Flash has 69,187 tensors and 159,609,485,896 bytes; Pro 145,116 and 864,704,792,696: the totals
    of the published indexes. DSpark stages are not part of it. Source: published safetensors index.
    """
    specs = (*_trunk(config), *_mtp(config))
    return {s.name: s for s in specs}


def of_trunk(name: str) -> bool:
    """Whether a tensor or parameter belongs to the trunk, not to an MTP block."""
    return not name.startswith("mtp.")


def routed_expert_format(config: ModelConfig, prefix: str) -> BlockScaledFormat | None:
    """Format of the routed experts under `prefix`; MTP experts of an NVFP4 file stay MXFP4."""
    if config.expert_format == "nvfp4":
        return MXFP4 if prefix.startswith("mtp.") else NVFP4
    return {"mxfp4": MXFP4, "fp8": FP8_BLOCK128}.get(config.expert_format)


def _plain(name: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, dtype, shape, name)


def _norm(name: str, width: int) -> TensorSpec:
    return _plain(f"{name}.weight", "BF16", width)


def _matrix(
    base: str, out: int, width: int, fmt: BlockScaledFormat | None, plain: str
) -> Iterator[TensorSpec]:
    """The tensors of one weight [out, width] in format `fmt`, or in dtype `plain` without one."""
    name = f"{base}.weight"
    if fmt is None:
        yield _plain(name, plain, out, width)
        return
    shape = (out, width)
    yield TensorSpec(name, fmt.value_dtype, fmt.payload_shape(shape), name, fmt)
    scale = f"{base}.weight_scale" if fmt is NVFP4 else f"{base}.scale"
    yield TensorSpec(scale, fmt.scale_dtype, fmt.scale_shape(shape), name, fmt)
    if fmt.has_global:
        yield TensorSpec(f"{base}.weight_scale_2", "F32", (), name, fmt)
        yield TensorSpec(f"{base}.input_scale", "F32", (), name, fmt)


def _linear(c: ModelConfig, base: str, out: int, width: int) -> Iterator[TensorSpec]:
    fmt = FP8_BLOCK128 if c.linear_format == "fp8" else None
    yield from _matrix(base, out, width, fmt, _PLAIN.get(c.linear_format, "BF16"))


def _mhc(c: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    n = c.hc_mult
    rows = n * (n + 2)
    yield _plain(f"{prefix}_fn", "F32", rows, n * c.hidden_size)
    yield _plain(f"{prefix}_base", "F32", rows)
    yield _plain(f"{prefix}_scale", "F32", 3)


def _hc_head(c: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    yield _plain(f"{prefix}hc_head_fn", "F32", c.hc_mult, c.hc_mult * c.hidden_size)
    yield _plain(f"{prefix}hc_head_base", "F32", c.hc_mult)
    yield _plain(f"{prefix}hc_head_scale", "F32", 1)


def _compressor(c: ModelConfig, prefix: str, kind: LayerKind, width: int) -> Iterator[TensorSpec]:
    halves = 2 if kind is LayerKind.CSA else 1
    yield _plain(f"{prefix}.ape", "F32", kind.ratio, halves * width)
    yield _plain(f"{prefix}.wkv.weight", "BF16", halves * width, c.hidden_size)
    yield _plain(f"{prefix}.wgate.weight", "BF16", halves * width, c.hidden_size)
    yield _norm(f"{prefix}.norm", width)


def _attention(c: ModelConfig, prefix: str, kind: LayerKind) -> Iterator[TensorSpec]:
    width = c.num_attention_heads * c.head_dim
    yield _plain(f"{prefix}.attn_sink", "F32", c.num_attention_heads)
    yield from _linear(c, f"{prefix}.wq_a", c.q_lora_rank, c.hidden_size)
    yield _norm(f"{prefix}.q_norm", c.q_lora_rank)
    yield from _linear(c, f"{prefix}.wq_b", width, c.q_lora_rank)
    yield from _linear(c, f"{prefix}.wkv", c.head_dim, c.hidden_size)
    yield _norm(f"{prefix}.kv_norm", c.head_dim)
    yield from _linear(c, f"{prefix}.wo_a", c.o_groups * c.o_lora_rank, width // c.o_groups)
    yield from _linear(c, f"{prefix}.wo_b", c.hidden_size, c.o_groups * c.o_lora_rank)
    if kind is not LayerKind.SWA:
        yield from _compressor(c, f"{prefix}.compressor", kind, c.head_dim)
    if kind is LayerKind.CSA:
        index = f"{prefix}.indexer"
        yield from _linear(c, f"{index}.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        yield _plain(f"{index}.weights_proj.weight", "BF16", c.index_n_heads, c.hidden_size)
        yield from _compressor(c, f"{index}.compressor", kind, c.index_head_dim)


def _ffn(c: ModelConfig, prefix: str, is_hash: bool) -> Iterator[TensorSpec]:
    D, F, E = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
    yield _plain(f"{prefix}.gate.weight", "BF16", E, D)
    if is_hash:
        yield _plain(f"{prefix}.gate.tid2eid", "I64", c.vocab_size, c.num_experts_per_tok)
    else:
        yield _plain(f"{prefix}.gate.bias", "F32", E)
    fmt, plain = routed_expert_format(c, prefix), _PLAIN.get(c.expert_format, "BF16")
    for name, out, width in (("w1", F, D), ("w2", D, F), ("w3", F, D)):
        yield from _linear(c, f"{prefix}.shared_experts.{name}", out, width)
        for e in range(E):
            yield from _matrix(f"{prefix}.experts.{e}.{name}", out, width, fmt, plain)


def _block(c: ModelConfig, prefix: str, kind: LayerKind, is_hash: bool) -> Iterator[TensorSpec]:
    yield _norm(f"{prefix}.attn_norm", c.hidden_size)
    yield _norm(f"{prefix}.ffn_norm", c.hidden_size)
    yield from _mhc(c, f"{prefix}.hc_attn")
    yield from _mhc(c, f"{prefix}.hc_ffn")
    yield from _attention(c, f"{prefix}.attn", kind)
    yield from _ffn(c, f"{prefix}.ffn", is_hash)


def _trunk(c: ModelConfig) -> Iterator[TensorSpec]:
    yield _plain("embed.weight", "BF16", c.vocab_size, c.hidden_size)
    for j in range(c.num_hidden_layers):
        yield from _block(c, f"layers.{j}", c.layer_kind(j), c.is_hash_layer(j))
    yield _norm("norm", c.hidden_size)
    yield from _hc_head(c, "")
    yield _plain("head.weight", "BF16", c.vocab_size, c.hidden_size)


def _mtp(c: ModelConfig) -> Iterator[TensorSpec]:
    """MTP blocks. A DSpark file holds draft stages under the same prefix, and none of these."""
    if c.dspark_block_size:
        return
    for j in range(c.num_nextn_predict_layers):
        prefix = f"mtp.{j}"
        yield from _block(c, prefix, LayerKind.SWA, is_hash=False)
        yield from _linear(c, f"{prefix}.e_proj", c.hidden_size, c.hidden_size)
        yield from _linear(c, f"{prefix}.h_proj", c.hidden_size, c.hidden_size)
        for name in ("enorm", "hnorm", "norm"):
            yield _norm(f"{prefix}.{name}", c.hidden_size)
        yield from _hc_head(c, f"{prefix}.")
