"""The one table of tensor names: official <-> transformers, both directions.

Official names are those of the DeepSeek release and the keys of a weights dict. transformers 5
uses its module names, with stacked experts (`save_pretrained(save_original_format=False)`), or a
mixture: official leaf names under the prefix `model.` (the default of `save_pretrained`).
"""

from __future__ import annotations

import re

# Names outside the layers.
_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}

# Modules of a layer, without `layers.N.` and without `.weight` or `.scale`.
_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.compressor.norm": "self_attn.compressor.kv_norm",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "attn.indexer.compressor.norm": "self_attn.compressor.indexer.kv_norm",
    "ffn.gate": "mlp.gate",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
}

# Parameters of a layer that have no such suffix.
_BARE = {
    **{
        f"hc_{half}_{part}": f"{half}_hc.{part}"
        for half in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
    "attn.attn_sink": "self_attn.sinks",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
}

# Stacked expert tensors of transformers and the official matrices they hold, in row order.
_STACKS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}

# Suffix of a module's tensor; the first of ours or theirs that fits is taken.
_SUFFIX = {".weight": ".weight", ".scale": ".weight_scale_inv"}
_TOP_INVERSE = {theirs: ours for ours, theirs in _TOP.items()}
_MODULES_INVERSE = {theirs: ours for ours, theirs in _MODULES.items()}
_BARE_INVERSE = {theirs: ours for ours, theirs in _BARE.items()}
_IN_LAYER = re.compile(r"layers\.(0|[1-9]\d{0,3})\.(.+)")
_STACKED = re.compile(
    r"model\.layers\.(0|[1-9]\d{0,3})\.mlp\.experts\.(gate_up_proj|down_proj)(_scale_inv)?"
)
_EXPERT = re.compile(r"ffn\.experts\.(?:0|[1-9]\d{0,3})\.(w[123])\.(weight|scale)")


def _split(rest: str) -> tuple[str, str]:
    """The module and the suffix of a name inside a layer, suffix in official spelling."""
    for ours, theirs in _SUFFIX.items():
        for spelling in (theirs, ours):
            if rest.endswith(spelling):
                return rest.removesuffix(spelling), ours
    return rest, ""


def to_official(name: str) -> str | None:
    """The official name of a tensor in a file that transformers wrote; None if there is none.

    Takes both ways `save_pretrained` writes, and `attn.norm` for `attn.kv_norm`, which the
    default way produces. A stacked expert tensor has many official names: `stacked_experts`.
    """
    if name in _TOP_INVERSE:
        return _TOP_INVERSE[name]
    if name in _TOP:
        return name
    match = _IN_LAYER.fullmatch(name.removeprefix("model."))
    if match is None:
        return None
    layer, rest = match.groups()
    if _EXPERT.fullmatch(rest):
        return f"layers.{layer}.{rest}"
    if rest == "attn.norm.weight":
        return f"layers.{layer}.attn.kv_norm.weight"
    bare = _BARE_INVERSE.get(rest, rest)
    if bare in _BARE:
        return f"layers.{layer}.{bare}"
    module, suffix = _split(rest)
    module = _MODULES_INVERSE.get(module, module)
    return f"layers.{layer}.{module}{suffix}" if module in _MODULES and suffix else None


def to_transformers(name: str) -> str | None:
    """The transformers module name of an official tensor; None for MTP, which it does not have.

    An expert matrix gives the name of the stacked tensor that holds it, a part of which it is.
    Raises ValueError for a name that no DeepSeek-V4 checkpoint has.
    """
    if name in _TOP:
        return _TOP[name]
    if name.startswith("mtp."):
        return None
    match = _IN_LAYER.fullmatch(name)
    if match is not None:
        layer, rest = match.groups()
        expert = _EXPERT.fullmatch(rest)
        if expert is not None:
            stack = "down_proj" if expert[1] == "w2" else "gate_up_proj"
            suffix = "_scale_inv" if expert[2] == "scale" else ""
            return f"model.layers.{layer}.mlp.experts.{stack}{suffix}"
        if rest in _BARE:
            return f"model.layers.{layer}.{_BARE[rest]}"
        module, _, leaf = rest.rpartition(".")
        if module in _MODULES and f".{leaf}" in _SUFFIX:
            return f"model.layers.{layer}.{_MODULES[module]}{_SUFFIX[f'.{leaf}']}"
    raise ValueError(f"name: expected an official tensor name, got {name!r}")


def stacked_experts(name: str, num_experts: int) -> tuple[str, ...]:
    """Official names of the equal parts of a stacked expert tensor, in storage order; or ().

    gate_up_proj [E, 2F, D] holds w1 then w3 of expert 0, then of expert 1, ...; down_proj
    [E, D, F] holds w2 of each. The same holds for their scales.
    """
    match = _STACKED.fullmatch(name)
    if match is None:
        return ()
    layer, stack, scale = match.groups()
    leaf = "scale" if scale else "weight"
    return tuple(
        f"layers.{layer}.ffn.experts.{e}.{matrix}.{leaf}"
        for e in range(num_experts)
        for matrix in _STACKS[stack]
    )
