"""Shows that the training model computes what the reference and transformers compute.

    python -m training.parity                        # random weights, against both
    python -m training.parity --weights training/runs/last/model.pt

FP32, no quantisation. With index_topk large enough for every entry, the largest logit difference
must stay below --tolerance. With the real index_topk, two implementations may order entries whose
scores differ by rounding differently, so there the share of equal positions must reach --share.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.reference.model import ReferenceModel
from training.attention import Switches
from training.checkpoint import load_weights, nano_config, split_names
from training.model import TrainingModel

Logits = Callable[[ModelConfig, dict[str, Tensor], Tensor], Tensor]

TRANSFORMERS_NAMES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^layers\.", "model.layers."),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.indexer\.compressor\.", ".attn.compressor.indexer."),
    (r"\.attn\.indexer\.wq_b\.", ".attn.compressor.indexer.q_b_proj."),
    (r"\.attn\.indexer\.weights_proj\.", ".attn.compressor.indexer.scorer.weights_proj."),
    (r"(compressor(?:\.indexer)?)\.wkv\.", r"\1.kv_proj."),
    (r"(compressor(?:\.indexer)?)\.wgate\.", r"\1.gate_proj."),
    (r"(compressor(?:\.indexer)?)\.ape$", r"\1.position_bias"),
    (r"(compressor(?:\.indexer)?)\.norm\.", r"\1.kv_norm."),
    (r"\.attn\.wq_a\.", ".attn.q_a_proj."),
    (r"\.attn\.q_norm\.", ".attn.q_a_norm."),
    (r"\.attn\.wq_b\.", ".attn.q_b_proj."),
    (r"\.attn\.wkv\.", ".attn.kv_proj."),
    (r"\.attn\.wo_a\.", ".attn.o_a_proj."),
    (r"\.attn\.wo_b\.", ".attn.o_b_proj."),
    (r"\.attn\.attn_sink$", ".attn.sinks"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.gate\.bias$", ".ffn.gate.e_score_correction_bias"),
    (r"shared_experts\.w1\.", "shared_experts.gate_proj."),
    (r"shared_experts\.w2\.", "shared_experts.down_proj."),
    (r"shared_experts\.w3\.", "shared_experts.up_proj."),
    (r"\.experts\.w2$", ".experts.down_proj"),
    (r"\.ffn\.", ".mlp."),
)


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The training model's state under transformers' names."""
    out = {}
    for name, value in state.items():
        if name.endswith(".experts.w3"):
            continue
        if name.endswith(".experts.w1"):
            value = torch.cat((value, state[name[:-1] + "3"]), 1)
            name = name[:-2] + "gate_up_proj"
        for pattern, new in TRANSFORMERS_NAMES:
            name = re.sub(pattern, new, name)
        out[name] = value
    return out


def transformers_logits(config: ModelConfig, state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits of transformers' DeepseekV4ForCausalLM in FP32; ids [B, T] -> [B, T, V]."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    kinds = {
        LayerKind.SWA: "sliding_attention", LayerKind.CSA: "compressed_sparse_attention",
        LayerKind.HCA: "heavily_compressed_attention",
    }  # fmt: skip
    c = config
    fields = asdict(c)
    for name in ("compress_ratios", "yarn", "expert_format", "linear_format", "qk_rope_head_dim",
                 "num_hash_layers", "dspark_block_size"):  # fmt: skip
        fields.pop(name)
    fields["layer_types"] = [kinds[c.layer_kind(i)] for i in range(c.num_hidden_layers)]
    fields["mlp_layer_types"] = [
        "hash_moe" if c.is_hash_layer(i) else "moe" for i in range(c.num_hidden_layers)
    ]
    fields["partial_rotary_factor"] = c.qk_rope_head_dim / c.head_dim
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    compress = {"rope_type": "yarn", "rope_theta": c.compress_rope_theta, "attention_factor": 1.0}
    compress |= asdict(c.yarn)
    share = {"partial_rotary_factor": c.qk_rope_head_dim / c.head_dim}
    fields["rope_parameters"] = {"main": rope | share, "compress": compress | share}
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**fields)).float().eval()
    missing = model.load_state_dict(to_transformers(state), strict=False)
    if missing.missing_keys or missing.unexpected_keys:
        raise KeyError(f"{missing.missing_keys[:4]} missing, {missing.unexpected_keys[:4]} unknown")
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def reference_logits(config: ModelConfig, state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits of tier 1 in FP32; ids [B, T] -> [B, T, V]."""
    model = ReferenceModel(config, split_names(state))
    return torch.stack([model.forward(row, model.new_cache()) for row in ids])


def perturb(model: TrainingModel, seed: int = 0) -> None:
    """Move every parameter away from its initial value, so that no term can hide."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            scale = 0.1 if parameter.dim() == 1 else 0.3 * parameter.std() + 0.02
            parameter.add_(noise * scale)
        for layer in model.layers:
            if not layer.ffn.gate.is_hash:
                bias = layer.ffn.gate.bias
                bias.copy_(torch.randn(bias.shape, generator=rng) * 0.05)
    c = model.config
    model.fill_hash_tables(torch.rand(c.vocab_size, generator=rng))


def compare(
    config: ModelConfig, state: dict[str, Tensor], ids: Tensor, others: Mapping[str, Logits]
) -> dict[str, Tensor]:
    """Largest logit difference at each position, for each other implementation; name -> [B, T]."""
    model = TrainingModel(config)
    model.load_state_dict(state)
    with torch.no_grad():
        ours = model(ids, Switches(sparse=True))[0]
    return {name: (ours - f(config, state, ids)).abs().amax(-1) for name, f in others.items()}


def main() -> int:
    """Command line; the exit code is 1 if a difference is too large."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--weights", type=Path, help="model.pt, pieces or a checkpoint; random weights without it"
    )
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--share", type=float, default=0.9)
    parser.add_argument("--skip-transformers", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = nano_config()
    if args.weights is None:
        model = TrainingModel(config)
        perturb(model)
        state = {k: v.detach() for k, v in model.state_dict().items()}
    else:
        state = {k: v for k, v in load_weights(args.weights).items() if not k.startswith("mtp.")}
    ids = torch.randint(3, config.vocab_size, (2, args.length))
    others: dict[str, Logits] = {"reference": reference_logits}
    if not args.skip_transformers:
        others["transformers"] = transformers_logits
    failed = False
    for topk in (args.length, config.index_topk):
        gaps = compare(replace(config, index_topk=topk), state, ids, others)
        for name, gap in gaps.items():
            equal = float((gap <= args.tolerance).float().mean())
            failed |= equal < (1.0 if topk == args.length else args.share)
            print(f"top-k {topk}, {name}: max |logit difference| {float(gap.max()):.2e}, "
                  f"{100 * equal:.1f} % of positions within {args.tolerance:g}")  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
