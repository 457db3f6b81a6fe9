"""One transformer block of the reference, put together from the oracles."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.taps import tap
from dsv4.reference.attention import (
    all_entries_indices,
    sparse_attn,
    visible_entries,
    window_indices,
)
from dsv4.reference.cache import LayerCache
from dsv4.reference.compressor import CompressorState, compress, compressor_rows
from dsv4.reference.experts import ExpertWeights, moe
from dsv4.reference.indexer import (
    indexer_head_weights,
    indexer_query,
    indexer_scores,
    indexer_topk,
)
from dsv4.reference.linear import grouped_output, linear, query_heads, query_latent
from dsv4.reference.mhc import mhc_mixes, mhc_post, mhc_pre, mhc_split_sinkhorn
from dsv4.reference.norm import rms_norm
from dsv4.reference.rope import apply_rope, layer_frequencies, rope_cos_sin
from dsv4.reference.router import router_hash, router_scores, router_topk, router_weights
from dsv4.reference.simulation import QuantSimulation
from dsv4.reference.weights import Weights


class Layer:
    """A trunk layer or an MTP block: attention and MoE, each wrapped in mHC.

    config, kind  what the block is; `is_hash` picks the router
    weights       view below "layers.3" or "mtp.0"
    name          prefix of the taps
    """

    def __init__(
        self, config: ModelConfig, kind: LayerKind, is_hash: bool, weights: Weights,
        simulate: QuantSimulation, name: str,
    ) -> None:  # fmt: skip
        self.config, self.kind, self.is_hash = config, kind, is_hash
        self.weights, self.simulate, self.name = weights, simulate, name
        self.freqs = layer_frequencies(config, kind)

    def forward(self, x: Tensor, ids: Tensor, cache: LayerCache) -> Tensor:
        """Run T more tokens of one sequence.

        x [T, N, D] streams, ids [T] (for the hash router), cache grows by T -> [T, N, D]
        """
        eps, w = self.config.rms_norm_eps, self.weights
        y, post, comb = self._mhc_pre(x, "hc_attn")
        o = self.attention(rms_norm(y, w["attn_norm.weight"], eps), cache)
        x = mhc_post(o, x, post, comb)
        y, post, comb = self._mhc_pre(x, "hc_ffn")
        o = self.ffn(rms_norm(y, w["ffn_norm.weight"], eps), ids)
        x = mhc_post(o, x, post, comb)
        tap(f"{self.name}.streams", x)
        return x

    def _mhc_pre(self, x: Tensor, which: str) -> tuple[Tensor, Tensor, Tensor]:
        c, w = self.config, self.weights
        mixes = mhc_mixes(x, w[f"{which}_fn"], c.rms_norm_eps)
        pre, post, comb = mhc_split_sinkhorn(
            mixes, w[f"{which}_scale"], w[f"{which}_base"], c.hc_sinkhorn_iters, c.hc_eps
        )
        for part, value in (("pre", pre), ("post", post), ("comb", comb)):
            tap(f"{self.name}.{which}.{part}", value)
        return mhc_pre(x, pre), post, comb

    def attention(self, x: Tensor, cache: LayerCache) -> Tensor:
        """SWA, CSA or HCA attention of T more tokens.

        x [T, D] after attn_norm -> [T, D]
        """
        c, w, name = self.config, self.weights.at("attn"), f"{self.name}.attn"
        act = self.simulate.activations
        positions = torch.arange(cache.length, cache.length + len(x), device=x.device)
        cos, sin = rope_cos_sin(positions, self.freqs, x.dtype)
        latent = query_latent(x, w["wq_a.weight"], w["q_norm.weight"], c.rms_norm_eps, act)
        q = query_heads(latent, w["wq_b.weight"], c.num_attention_heads, c.rms_norm_eps, act)
        q = apply_rope(q, cos, sin)
        kv = rms_norm(linear(x, w["wkv.weight"], act), w["kv_norm.weight"], c.rms_norm_eps)
        kv = self.simulate.round_kv(apply_rope(kv, cos, sin), c.qk_rope_head_dim)
        tap(f"{name}.q", q)
        tap(f"{name}.kv", kv)
        entry_indices = self._compressed(x, latent, positions, cos, sin, cache)
        rows, first = cache.extend_window(kv, c.sliding_window)
        indices = window_indices(positions, first, c.sliding_window)
        if cache.entries is not None:
            offset = torch.where(entry_indices >= 0, entry_indices + len(rows), -1)
            rows, indices = torch.cat((rows, cache.entries)), torch.cat((indices, offset), dim=1)
        o = sparse_attn(q, rows, indices, w["attn_sink"], c.head_dim**-0.5)
        o = apply_rope(o, cos, sin, inverse=True)
        out = grouped_output(o, w["wo_a.weight"], w["wo_b.weight"], c.o_groups, act)
        tap(f"{name}.out", out)
        return out

    def _compressed(
        self, x: Tensor, latent: Tensor, positions: Tensor, cos: Tensor, sin: Tensor,
        cache: LayerCache,
    ) -> Tensor:  # fmt: skip
        """Append the entries these tokens complete; pick each query's entries [T, K]."""
        if cache.entries is None or cache.compressor is None:
            return positions.new_zeros(len(x), 0)
        c, w, name = self.config, self.weights.at("attn"), f"{self.name}.attn"
        new, cache.compressor = self._entries(
            x, positions, w.at("compressor"), cache.compressor, len(cache.entries)
        )
        new = self.simulate.round_kv(new, c.qk_rope_head_dim)
        tap(f"{name}.compressed", new)
        entries = cache.entries = torch.cat((cache.entries, new))
        visible = visible_entries(positions, self.kind.ratio)
        if self.kind is LayerKind.HCA:
            return all_entries_indices(visible, len(entries))
        return self._select(x, latent, positions, cos, sin, visible, cache)

    def _entries(
        self, x: Tensor, positions: Tensor, w: Weights, state: CompressorState, first: int
    ) -> tuple[Tensor, CompressorState]:
        """Compressed entries after norm and RoPE, the first of them with index `first`."""
        rows = compressor_rows(x, positions, w["wkv.weight"], w["wgate.weight"], w["ape"])
        pooled, state = compress(state, *rows, self.kind)
        new = rms_norm(pooled.to(x.dtype), w["norm.weight"], self.config.rms_norm_eps)
        entry = torch.arange(first, first + len(new), device=x.device)
        return apply_rope(new, *rope_cos_sin(entry * self.kind.ratio, self.freqs, x.dtype)), state

    def _select(
        self, x: Tensor, latent: Tensor, positions: Tensor, cos: Tensor, sin: Tensor,
        visible: Tensor, cache: LayerCache,
    ) -> Tensor:  # fmt: skip
        """Run the indexer: append its keys and pick each query's top-k entries [T, K]."""
        c, w, name = self.config, self.weights.at("attn.indexer"), f"{self.name}.attn.indexer"
        assert cache.index_keys is not None
        assert cache.index_compressor is not None
        keys, cache.index_compressor = self._entries(
            x, positions, w.at("compressor"), cache.index_compressor, len(cache.index_keys)
        )
        cache.index_keys = torch.cat((cache.index_keys, self.simulate.round_index(keys)))
        q = indexer_query(latent, w["wq_b.weight"], c.index_n_heads, self.simulate.activations)
        q = self.simulate.round_index(apply_rope(q, cos, sin))
        head_weights = indexer_head_weights(x, w["weights_proj.weight"], c.index_head_dim)
        scores = indexer_scores(q, cache.index_keys, head_weights, visible)
        chosen = indexer_topk(scores, visible, c.index_topk)
        for part, value in (("q", q), ("keys", keys), ("scores", scores), ("topk", chosen)):
            tap(f"{name}.{part}", value)
        return chosen

    def ffn(self, x: Tensor, ids: Tensor) -> Tensor:
        """Route and run the experts.

        x [T, D] after ffn_norm, ids [T] -> [T, D]
        """
        c, w, name = self.config, self.weights.at("ffn"), f"{self.name}.ffn"
        scores = router_scores(x, w["gate.weight"])
        if self.is_hash:
            experts = router_hash(w["gate.tid2eid"], ids)
        else:
            experts = router_topk(scores, w["gate.bias"], c.num_experts_per_tok)
        weights = router_weights(scores, experts, c.routed_scaling_factor)
        tap(f"{name}.router.ids", experts)
        tap(f"{name}.router.weights", weights)

        def routed(e: int) -> ExpertWeights:
            return _expert_weights(w.at(f"experts.{e}"))

        out = moe(
            x, experts, weights, routed, _expert_weights(w.at("shared_experts")), c.swiglu_limit,
            self.simulate.activations,
        )  # fmt: skip
        tap(f"{name}.out", out)
        return out


def _expert_weights(w: Weights) -> ExpertWeights:
    return w["w1.weight"], w["w2.weight"], w["w3.weight"]
