"""Tier 0: transformers' DeepseekV4ForCausalLM behind the interface of the reference.

An oracle that shares no line of the forward pass with this package. Built from the config class
itself: no remote code, no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.errors import MissingExtra, RequestError
from dsv4.core.formats import BlockScaledTensor
from dsv4.core.taps import tap
from dsv4.loader.convert import transformers_state_dict
from dsv4.reference.quant import dequantize

# Fields that both configs have under one name.
_SAME = (
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "head_dim", "q_lora_rank", "num_experts_per_tok", "n_routed_experts",
    "n_shared_experts", "routed_scaling_factor", "max_position_embeddings", "rope_theta",
    "compress_rope_theta", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "swiglu_limit",
    "sliding_window", "o_groups", "o_lora_rank", "index_n_heads", "index_head_dim", "index_topk",
    "rms_norm_eps", "bos_token_id", "eos_token_id",
)  # fmt: skip
_LAYER_TYPE = {
    LayerKind.SWA: "sliding_attention",
    LayerKind.CSA: "compressed_sparse_attention",
    LayerKind.HCA: "heavily_compressed_attention",
}


class TransformersModel:
    """transformers' model with our weights, dequantised. MTP blocks are left out: it has none.

    config, weights  as of ReferenceModel. Everything runs in FP32
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor | BlockScaledTensor]
    ) -> None:
        self.config, self.device = config, torch.device("cpu")
        plain = {
            name: dequantize(w) if isinstance(w, BlockScaledTensor) else w
            for name, w in weights.items()
            if not name.startswith("mtp.")
        }
        state = transformers_state_dict(plain)
        self.model = _build(config, {
            name: x.float() if x.is_floating_point() else x for name, x in state.items()
        })  # fmt: skip
        _add_taps(self.model)

    def new_cache(self) -> Any:
        """An empty cache for one sequence."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: Any, last_only: bool = False) -> Tensor:
        """Logits of T more tokens: ids [T] -> [T, V] FP32, or [1, V] of the last one only."""
        V, limit = self.config.vocab_size, self.config.max_position_embeddings
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < V:
            raise RequestError("ids", f"0 to {V - 1}", f"{int(ids.min())} to {int(ids.max())}")
        if cache.get_seq_length() + len(ids) > limit:
            raise RequestError("ids", f"at most {limit} positions", cache.get_seq_length())
        keep = 1 if last_only else 0
        out = self.model(
            input_ids=ids[None], past_key_values=cache, use_cache=True, logits_to_keep=keep
        )
        logits = out.logits[0].float()
        tap("logits", logits)
        return logits


def transformers_config(config: ModelConfig) -> Any:
    """The DeepseekV4Config that says what `config` says."""
    try:
        from transformers import DeepseekV4Config
    except ImportError as e:
        raise MissingExtra("transformers with DeepseekV4ForCausalLM", "hf") from e
    c, L = config, config.num_hidden_layers
    rotary = {"partial_rotary_factor": c.qk_rope_head_dim / c.head_dim}
    compress: dict[str, Any] = {"rope_type": "default"}
    if c.yarn is not None:
        y = c.yarn
        # transformers would scale cos and sin by a factor of its own without attention_factor
        compress = {
            "rope_type": "yarn", "factor": y.factor, "beta_fast": y.beta_fast,
            "beta_slow": y.beta_slow, "attention_factor": 1.0,
            "original_max_position_embeddings": y.original_max_position_embeddings,
        }  # fmt: skip
    return DeepseekV4Config(
        **{name: getattr(c, name) for name in _SAME},
        **rotary,
        layer_types=[_LAYER_TYPE[c.layer_kind(j)] for j in range(L)],
        mlp_layer_types=["hash_moe" if c.is_hash_layer(j) else "moe" for j in range(L)],
        rope_parameters={
            "main": {"rope_type": "default", "rope_theta": c.rope_theta, **rotary},
            "compress": compress | {"rope_theta": c.compress_rope_theta, **rotary},
        },
        num_nextn_predict_layers=0,
        attn_implementation="eager",
    )


def _build(config: ModelConfig, state: Mapping[str, Tensor]) -> Any:
    hf_config = transformers_config(config)
    from transformers import DeepseekV4ForCausalLM

    with torch.device("meta"):  # no memory and no time for weights that are replaced below
        model = DeepseekV4ForCausalLM(hf_config)
    model.load_state_dict(dict(state), strict=True, assign=True)
    # The rotary tables are computed, not stored: make them anew, off the meta device.
    for module in model.modules():
        if hasattr(module, "rotary_emb"):
            module.rotary_emb = type(module.rotary_emb)(hf_config)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RequestError(
            "transformers", "a version whose model this package knows", f"unset: {left[:5]}",
            "install another version of transformers",
        )  # fmt: skip
    return model.eval()


def _add_taps(model: nn.Module) -> None:
    """Offer what transformers computes under the names of docs/taps.md, without the batch dim."""

    def on(module: nn.Module, *names: str) -> None:
        def hook(_module: nn.Module, _args: object, out: Any) -> None:
            values = out if isinstance(out, tuple) else (out,)
            for name, value in zip(names, values, strict=False):
                if name:
                    tap(name, value[0] if value.dim() > 2 else value)

        module.register_forward_hook(hook)

    for j, layer in enumerate(model.model.layers):  # type: ignore[union-attr]
        prefix = f"layers.{j}"
        for which in ("attn", "ffn"):
            on(
                getattr(layer, f"{which}_hc"),
                f"{prefix}.hc_{which}.post",
                f"{prefix}.hc_{which}.comb",
            )
        indexer = getattr(getattr(layer.self_attn, "compressor", None), "indexer", None)
        if indexer is not None:
            on(indexer, f"{prefix}.attn.indexer.topk")
        on(layer.self_attn, f"{prefix}.attn.out")
        on(layer.mlp.gate, "", f"{prefix}.ffn.router.weights", f"{prefix}.ffn.router.ids")
        on(layer.mlp, f"{prefix}.ffn.out")
        on(layer, f"{prefix}.streams")
